"""The architecture search (paper, section 3): from a data set to a better decoder."""
