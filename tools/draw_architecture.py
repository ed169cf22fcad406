"""Draw the architecture of a config's MODEL.GENOTYPE.

  python tools/draw_architecture.py --config-file FILE --output picture.png
  python tools/draw_architecture.py --config-file FILE --output picture.svg MODEL.GENOTYPE "[...]"

The picture shows the cells of the pyramid and, if MODEL.HEAD.TOWER is searched, the layers of the
head. A description in words goes to the log.
"""

import dataclasses
import logging
import sys
from pathlib import Path

from nasfcos.config import ConfigError, load_config
from nasfcos.drawing import FORMATS, save_architecture
from nasfcos.engine.launch import argument_parser, run
from nasfcos.genotype import Genotype

logger = logging.getLogger("nasfcos.draw_architecture")


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help=f"file of the picture, ending in {', '.join(FORMATS)}",
    )
    parser.add_argument("--title", help="title of the picture (default: name of the config file)")
    args = parser.parse_intermixed_args()
    if args.output.suffix.lower() not in FORMATS:
        parser.error(f"--output must end in one of {', '.join(FORMATS)}, not {args.output.name!r}")

    def job() -> None:
        cfg = load_config(args.config_file, args.overrides)
        if not cfg.MODEL.GENOTYPE:
            raise ConfigError(
                f"{args.config_file} has no searched architecture to draw: its MODEL.GENOTYPE is "
                "empty. Name a config with a searched pyramid, or give MODEL.GENOTYPE after the "
                "options"
            )
        genotype = Genotype.parse(cfg.MODEL.GENOTYPE)
        if cfg.MODEL.HEAD.TOWER == "plain" and genotype.head_ops:
            logger.info("the head is not drawn: MODEL.HEAD.TOWER is plain, so it is not searched")
            genotype = dataclasses.replace(genotype, head_split=None, head_ops=())
        if cfg.MODEL.NECK.NAME != "nas_fpn":
            logger.warning(
                "MODEL.NECK.NAME is %s, so the detector of this config does not use the cells",
                cfg.MODEL.NECK.NAME,
            )
        title = args.title if args.title is not None else Path(args.config_file).stem
        save_architecture(genotype, args.output, title)
        logger.info("%s", genotype.describe())
        logger.info("drawn to %s", args.output)

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
