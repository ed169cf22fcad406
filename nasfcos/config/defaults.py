"""The one config tree: every key, its default and its meaning.

Only builders read it. A YAML file names the keys that differ, may inherit from another file with
``_BASE_``, and is checked against this tree when it is loaded (`nasfcos.config.load_config`).
"""

from yacs.config import CfgNode as CN

from ..genotype import AGGREGATIONS, FPN_OPS, HEAD_OPS

_C = CN()

# ------------------------------------------------------------------------------------------ model
_C.MODEL = CN()
# "auto" takes the GPU where there is one; else "cpu", "cuda", "cuda:1", ...
_C.MODEL.DEVICE = "auto"
# Weights to start from (training) or to use (testing): a path or URL of a released model, a
# checkpoint of this project or an ImageNet backbone; "catalog://ImageNetPretrained/MSRA/R-50" and
# "torchvision://resnet50" name the usual backbones. A URL may end in "#sha256=<hex>". Empty:
# initialise at random.
_C.MODEL.WEIGHT = ""
# Number of object classes, background not counted. 0: as many as the training data has.
_C.MODEL.NUM_CLASSES = 0
# The searched architecture: one [[in0, in1, op0, op1, agg]] per FPN cell, and, where the head is
# searched too, [i] and the head operations (see nasfcos/genotype.py). Empty: nothing is searched.
_C.MODEL.GENOTYPE = []
# Compute the trainable batch norms over all processes (training on several GPUs).
_C.MODEL.SYNC_BN = False
# Your own Python modules (by name, on PYTHONPATH) that register backbones, necks or heads; see
# nasfcos/models/registry.py. CUSTOM is for whatever settings these have.
_C.MODEL.IMPORTS = ()
_C.MODEL.CUSTOM = CN(new_allowed=True)

_C.MODEL.BACKBONE = CN()
# "resnet", "mobilenet_v2", or one of your own.
_C.MODEL.BACKBONE.NAME = "resnet"
# What is not trained. resnet: 0 nothing, 1 the stem, 2 the stem and the first stage, ... 5 all.
# mobilenet_v2: so many of its 18 layers (the stem and 17 blocks; 14 to C4, 18 all).
_C.MODEL.BACKBONE.FREEZE_AT = 2

_C.MODEL.RESNET = CN()
# Bottleneck blocks of the four stages; ResNet-50 is [3, 4, 6, 3], ResNet-101 [3, 4, 23, 3].
_C.MODEL.RESNET.BLOCKS = [3, 4, 6, 3]
# Groups of the 3x3 convs and channels per group in the first stage (ResNeXt-101-32x8d: 32 and 8).
_C.MODEL.RESNET.NUM_GROUPS = 1
_C.MODEL.RESNET.WIDTH_PER_GROUP = 64
# Channels of the stem; the first stage puts out four times as many (C2), each next one twice more.
_C.MODEL.RESNET.STEM_CHANNELS = 64
# Where a downsampling block strides: in its first 1x1 conv (R-50 and R-101 of MSRA) or in the 3x3.
_C.MODEL.RESNET.STRIDE_IN_1X1 = True
# "frozen_bn" (constants, for ImageNet weights and small batches) or "bn" (training from scratch).
_C.MODEL.RESNET.NORM = "frozen_bn"

_C.MODEL.MOBILENET = CN()
# Multiplier of all channel numbers. Released models: 1.0.
_C.MODEL.MOBILENET.WIDTH = 1.0

_C.MODEL.NECK = CN()
# "fpn" (the plain pyramid), "nas_fpn" (the cells of MODEL.GENOTYPE), or one of your own.
_C.MODEL.NECK.NAME = "fpn"
# Channels of every pyramid level.
_C.MODEL.NECK.CHANNELS = 256

_C.MODEL.HEAD = CN()
# "fcos", "retinanet", or one of your own.
_C.MODEL.HEAD.NAME = "fcos"
# "plain" (NUM_CONVS 3x3 convs) or "searched" (the head part of MODEL.GENOTYPE).
_C.MODEL.HEAD.TOWER = "plain"
# Convs of a plain tower.
_C.MODEL.HEAD.NUM_CONVS = 4
# Foreground probability that a fresh classifier predicts everywhere.
_C.MODEL.HEAD.PRIOR_PROB = 0.01
# Focal loss: exponent, and weight of the foreground.
_C.MODEL.HEAD.FOCAL_GAMMA = 2.0
_C.MODEL.HEAD.FOCAL_ALPHA = 0.25

_C.MODEL.FCOS = CN()
# Largest box distance that P3, P4, P5 and P6 answer for, in pixels; P7 takes all above.
_C.MODEL.FCOS.SIZE_LIMITS = [64, 128, 256, 512]

_C.MODEL.RETINANET = CN()
# Side of the anchors of P3 in pixels; it doubles from level to level.
_C.MODEL.RETINANET.ANCHOR_SIZE = 32
_C.MODEL.RETINANET.SCALES_PER_OCTAVE = 3
_C.MODEL.RETINANET.ASPECT_RATIOS = [0.5, 1.0, 2.0]
# An anchor is foreground at this IoU with a box, background below the other; between: ignored.
_C.MODEL.RETINANET.FG_IOU = 0.5
_C.MODEL.RETINANET.BG_IOU = 0.4
_C.MODEL.RETINANET.SMOOTH_L1_BETA = 0.11
# Weight of the box loss is 1 over this.
_C.MODEL.RETINANET.BOX_LOSS_DIVISOR = 4.0

# ------------------------------------------------------------------------------------------ input
_C.INPUT = CN()
# Short side in pixels; training draws one of several for each image. The long side is at most MAX.
_C.INPUT.MIN_SIZE_TRAIN = (800,)
_C.INPUT.MAX_SIZE_TRAIN = 1333
# (low, high): training draws the short side from the whole range instead. Empty: off.
_C.INPUT.MIN_SIZE_RANGE_TRAIN = ()
_C.INPUT.MIN_SIZE_TEST = 800
_C.INPUT.MAX_SIZE_TEST = 1333
# Probability of a left-right flip in training.
_C.INPUT.FLIP_PROB = 0.5
# Strength of the colour jitter in training; 0 switches each part off.
_C.INPUT.BRIGHTNESS = 0.0
_C.INPUT.CONTRAST = 0.0
_C.INPUT.SATURATION = 0.0
_C.INPUT.HUE = 0.0

# ------------------------------------------------------------------------------------------- data
_C.DATASETS = CN()
# Names: built in ("coco_2017_train", "coco_2017_val", "coco_2017_test_dev", "voc_2007_trainval",
# "voc_2012_train", ...) or defined under DATASETS.CUSTOM. Several training sets are joined.
_C.DATASETS.TRAIN = ("coco_2017_train",)
_C.DATASETS.TEST = ("coco_2017_val",)
# Folder in which the built-in names (coco/, voc/) and relative paths of custom data sets are looked
# up. Empty: the environment variable NASFCOS_DATA, else "datasets".
_C.DATASETS.ROOT = ""
# Own data: NAME: {FORMAT: coco, IMAGES: folder, ANNOTATIONS: file.json, CLASSES: [a, b]}, or
# NAME: {FORMAT: voc, IMAGES: folder, ANNOTATIONS: folder of XML files, SPLIT: list.txt,
# CLASSES: [a, b]}. CLASSES may be left out: then they follow from the annotations.
_C.DATASETS.CUSTOM = CN(new_allowed=True)
# Images that may be missing or broken (each is logged and skipped) before this becomes an error.
_C.DATASETS.MAX_BAD_IMAGES = 10

_C.DATALOADER = CN()
# Worker processes per training process.
_C.DATALOADER.NUM_WORKERS = 2
# Batches are padded to a multiple of this many pixels.
_C.DATALOADER.SIZE_DIVISIBILITY = 32
# Put images of like orientation into one batch (less padding).
_C.DATALOADER.ASPECT_RATIO_GROUPING = True
# Leave images without any box out of training (the released models) or train them as background.
_C.DATALOADER.SKIP_EMPTY = True

# ------------------------------------------------------------------------------------------ solver
_C.SOLVER = CN()
_C.SOLVER.OPTIMIZER = "sgd"  # or "adamw"
_C.SOLVER.BASE_LR = 0.01
# Decay of the mean gradient and, of adamw alone, of the mean square: 0.999 takes a thousand
# iterations to forget, so short schedules are better off with less.
_C.SOLVER.MOMENTUM = 0.9
_C.SOLVER.BETA2 = 0.999
_C.SOLVER.WEIGHT_DECAY = 1e-4
# Biases: factor on the learning rate, and their own weight decay.
_C.SOLVER.BIAS_LR_FACTOR = 2.0
_C.SOLVER.WEIGHT_DECAY_BIAS = 0.0
# "step": multiply by GAMMA at each of STEPS; "cosine": fall to zero at MAX_ITER.
_C.SOLVER.SCHEDULE = "step"
_C.SOLVER.GAMMA = 0.1
_C.SOLVER.STEPS = (60000, 80000)
_C.SOLVER.MAX_ITER = 90000
_C.SOLVER.WARMUP_METHOD = "linear"  # or "constant"
_C.SOLVER.WARMUP_FACTOR = 1.0 / 3
_C.SOLVER.WARMUP_ITERS = 500
# Images of one optimizer step over all processes and accumulated parts.
_C.SOLVER.IMS_PER_BATCH = 16
# Parts in which each process computes its share of the batch (memory against time).
_C.SOLVER.ACCUMULATE = 1
# Largest norm of the gradient; 0: not clipped.
_C.SOLVER.CLIP_GRAD_NORM = 0.0
# Mixed precision: "off", "bf16" or "fp16" (with loss scaling, on GPUs).
_C.SOLVER.AMP = "off"
# Iterations between checkpoints, and how many of them are kept (the last one always is).
_C.SOLVER.CHECKPOINT_PERIOD = 2500
_C.SOLVER.KEEP_CHECKPOINTS = 3
# Iterations between lines of the log and of metrics.jsonl.
_C.SOLVER.LOG_PERIOD = 20

# -------------------------------------------------------------------------------------------- test
_C.TEST = CN()
# Images of one batch over all processes.
_C.TEST.IMS_PER_BATCH = 8
# Of maps and weights in testing and prediction: float32, or bfloat16 or float16 where the device
# multiplies those faster.
_C.TEST.DTYPE = "float32"
# Iterations between evaluations while training; 0: only at the end.
_C.TEST.EVAL_PERIOD = 0
# Class probability below which a prediction is dropped before NMS.
_C.TEST.SCORE_THRESHOLD = 0.05
# Predictions of one level that go on to NMS, IoU of the NMS, detections of one image.
_C.TEST.PRE_NMS_TOP_N = 1000
_C.TEST.NMS_IOU = 0.6
_C.TEST.DETECTIONS_PER_IMAGE = 100

# ------------------------------------------------------------------------------------------ search
_C.SEARCH = CN()
# What is searched, in this order: "fpn" (with the plain head) and "head" (on the best FPN found, or
# on the cells of MODEL.GENOTYPE where the FPN is not searched).
_C.SEARCH.STAGES = ("fpn", "head")
# Fraction of the training images on which trials are rewarded (meta-val); the rest trains them.
_C.SEARCH.META_VAL = 0.3
# Start from MODEL.GENOTYPE, not from nothing: it is the first trial of each stage, evolution breeds
# from it, and in the end it is trained in full as well, so that nothing worse can be found.
_C.SEARCH.FROM_GENOTYPE = False

_C.SEARCH.SPACE = CN()
# Cells of the FPN (at least three), and the operations and aggregations that may be chosen.
_C.SEARCH.SPACE.CELLS = 7
_C.SEARCH.SPACE.FPN_OPS = FPN_OPS
_C.SEARCH.SPACE.AGGREGATIONS = AGGREGATIONS
# Layers of the head, and the operations that may be chosen.
_C.SEARCH.SPACE.HEAD_LAYERS = 6
_C.SEARCH.SPACE.HEAD_OPS = HEAD_OPS

# The backbone is fine-tuned once, with the plain FPN and the plain head.
_C.SEARCH.PREPARE = CN()
# Weights of a detector (or backbone) to take instead of fine-tuning, in the forms of MODEL.WEIGHT.
_C.SEARCH.PREPARE.WEIGHT = ""
# KEY VALUE pairs that differ in the fine-tuning, as on the command line.
_C.SEARCH.PREPARE.OVERRIDES = []

# The backbone's maps of every image, computed once.
_C.SEARCH.CACHE = CN()
# Images are resized to this short side, and cropped to a square of it (pixels).
_C.SEARCH.CACHE.SIZE = 384
# Random crops of each meta-train image (meta-val has one, in the centre).
_C.SEARCH.CACHE.CROPS = 1
# Folder of the files; empty: "cache" in OUTPUT_DIR.
_C.SEARCH.CACHE.FOLDER = ""

# A trial: the decoder of one genotype is trained on the cached maps, and rewarded by the negative
# sum of its losses on meta-val.
_C.SEARCH.PROXY = CN()
_C.SEARCH.PROXY.FPN_CHANNELS = 64
_C.SEARCH.PROXY.HEAD_CHANNELS = 128
_C.SEARCH.PROXY.ITERATIONS = 300
_C.SEARCH.PROXY.BATCH = 200
_C.SEARCH.PROXY.LR = 8e-4
# Factor of the running average of the weights that are evaluated; 0: the weights themselves.
_C.SEARCH.PROXY.POLYAK = 0.9
# Mixed precision: "off" or "bf16".
_C.SEARCH.PROXY.AMP = "off"
# Iterations that train the best FPN once, before its outputs are cached for the head stage.
_C.SEARCH.PROXY.NECK_ITERATIONS = 900

# Trials of each stage.
_C.SEARCH.TRIALS = CN()
_C.SEARCH.TRIALS.FPN = 2800
_C.SEARCH.TRIALS.HEAD = 600

# "ppo", "random" or "evolution".
_C.SEARCH.STRATEGY = "ppo"
# Architectures that are proposed together, before any of them is learnt from.
_C.SEARCH.BATCH = 20

_C.SEARCH.PPO = CN()
_C.SEARCH.PPO.HIDDEN = 64
_C.SEARCH.PPO.LR = 1e-2
# Passes over each batch, and the clip of the probability ratio.
_C.SEARCH.PPO.EPOCHS = 5
_C.SEARCH.PPO.CLIP = 0.2
# Weight of the entropy bonus, and decay of the moving baseline of the reward.
_C.SEARCH.PPO.ENTROPY = 0.02
_C.SEARCH.PPO.BASELINE_DECAY = 0.9
# Largest norm of the gradient; 0: not clipped.
_C.SEARCH.PPO.CLIP_GRAD_NORM = 1.0

_C.SEARCH.EVOLUTION = CN()
# Youngest architectures that may be parents, and how many of them compete for it.
_C.SEARCH.EVOLUTION.POPULATION = 20
_C.SEARCH.EVOLUTION.TOURNAMENT = 10

# A second objective: reward - WEIGHT * max(0, cost / TARGET - 1); in the head stage TARGET_HEAD
# stands for TARGET. The cost is that of what a trial trains (in the FPN stage the FPN and the plain
# head, in the head stage the head alone) at the widths of SEARCH.PROXY and on crops of
# SEARCH.CACHE.SIZE. The columns `flops` and `latency` of trials_*.csv have it.
_C.SEARCH.OBJECTIVE = CN()
# "none", "flops" (multiply-adds, in G) or "latency" (milliseconds), both of one crop.
_C.SEARCH.OBJECTIVE.COST = "none"
_C.SEARCH.OBJECTIVE.TARGET = 1.0
_C.SEARCH.OBJECTIVE.TARGET_HEAD = 1.0
_C.SEARCH.OBJECTIVE.WEIGHT = 0.0

# Early stopping of hopeless trials (successive halving).
_C.SEARCH.PRUNING = CN()
# Iterations at which a trial is judged; empty: every trial is trained to the end.
_C.SEARCH.PRUNING.RUNGS = ()
# Share of the trials that go on at each rung, and finished trials before any is stopped.
_C.SEARCH.PRUNING.KEEP = 0.5
_C.SEARCH.PRUNING.STARTUP = 20

# Where trials run: "inline" (this process), "local" (worker processes) or "ray" (a Ray cluster).
_C.SEARCH.EXECUTOR = "inline"
# Trials at a time. 0: one for each GPU, or where there is none, for each core.
_C.SEARCH.WORKERS = 0
# How often a trial is tried again whose worker died.
_C.SEARCH.RETRIES = 2
# Seconds after which a worker that is still at its trial counts as dead ("local" and "ray"): then
# what fails may depend on the machine. 0: a trial may take as long as it does.
_C.SEARCH.TRIAL_TIMEOUT = 0
# Seconds between refreshed reports.
_C.SEARCH.REPORT_PERIOD = 60

# The best of a stage are trained in full, by the ordinary training.
_C.SEARCH.SELECT = CN()
# So many of the best by the objective (at least as many as are trained) are tried again so many
# times, with other first weights and other batches, and ranked by the mean: the best reward of many
# trials is luck in part. 0 times: not.
_C.SEARCH.SELECT.CANDIDATES = 20
_C.SEARCH.SELECT.RETRIALS = 2
# How many FPNs and heads are trained. One: the best is taken as it is, unless its stage is last.
_C.SEARCH.SELECT.FPN = 20
_C.SEARCH.SELECT.HEAD = 10
# Full trainings of each, from SEED on; the mean of their APs counts. On small data one says little.
# One that diverges costs its architecture its place.
_C.SEARCH.SELECT.SEEDS = 1
# KEY VALUE pairs that differ in the full training, as on the command line.
_C.SEARCH.SELECT.OVERRIDES = []

# -------------------------------------------------------------------------------------------- rest
# Seed of weights, data order and augmentation. -1: a new one for each run (it is logged).
_C.SEED = 0
# Everything that a run writes goes here.
_C.OUTPUT_DIR = "output"


def get_defaults() -> CN:
    """A fresh copy of the default tree, to change at will."""
    return _C.clone()
