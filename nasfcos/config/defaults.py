"""The config tree: every key, its default and its meaning.

A YAML file sets the keys that differ, may inherit from other files by ``_BASE_``, and is checked
against this tree when it is loaded (`nasfcos.config.load_config`). The values that a key may have
are checked in checks.py.
"""

from yacs.config import CfgNode as CN

from ..genotype import AGGREGATIONS, FPN_OPS, HEAD_OPS

_C = CN()

# ------------------------------------------------------------------------------------------ model
_C.MODEL = CN()
# "auto" (a GPU if there is one, else the CPU), "cpu", "cuda", "cuda:1", ...
_C.MODEL.DEVICE = "auto"
# Weights to start from (training) or to use (testing): the path or URL of a released model, of a
# checkpoint of this project or of an ImageNet backbone. "catalog://ImageNetPretrained/MSRA/R-50"
# and "torchvision://resnet50" name the usual backbones. A URL may end in "#sha256=<hex>". Empty:
# random initialisation.
_C.MODEL.WEIGHT = ""
# Number of object classes without the background. 0: as many as the training data has.
_C.MODEL.NUM_CLASSES = 0
# The searched architecture: one [[in0, in1, op0, op1, agg]] per FPN cell and, if the head is
# searched too, [i] and the head operations (see nasfcos/genotype.py). Empty: no searched parts.
_C.MODEL.GENOTYPE = []
# Compute the statistics of trainable batch norms over all processes (training on several GPUs).
_C.MODEL.SYNC_BN = False
# Your own Python modules (by name, on PYTHONPATH) that register backbones, necks or heads; see
# nasfcos/models/registry.py. CUSTOM holds their settings, of any name and type.
_C.MODEL.IMPORTS = ()
_C.MODEL.CUSTOM = CN(new_allowed=True)

_C.MODEL.BACKBONE = CN()
# "resnet", "mobilenet_v2", or one of your own.
_C.MODEL.BACKBONE.NAME = "resnet"
# What is frozen. resnet: 0 nothing, 1 the stem, 2 the stem and the first stage, ... 5 everything.
# mobilenet_v2: the number of leading layers (of 18: the stem and 17 blocks); 14 = up to C4.
_C.MODEL.BACKBONE.FREEZE_AT = 2

_C.MODEL.RESNET = CN()
# Number of bottleneck blocks in the four stages; ResNet-50 [3, 4, 6, 3], ResNet-101 [3, 4, 23, 3].
_C.MODEL.RESNET.BLOCKS = [3, 4, 6, 3]
# Groups of the 3x3 convs, and channels per group in the first stage (ResNeXt-101-32x8d: 32 and 8).
_C.MODEL.RESNET.NUM_GROUPS = 1
_C.MODEL.RESNET.WIDTH_PER_GROUP = 64
# Channels of the stem. C2 has four times as many channels; each later stage doubles them.
_C.MODEL.RESNET.STEM_CHANNELS = 64
# True: a downsampling block has its stride in the first 1x1 conv (R-50 and R-101 of MSRA); False:
# in the 3x3 conv.
_C.MODEL.RESNET.STRIDE_IN_1X1 = True
# "frozen_bn" (fixed statistics and weights, for ImageNet weights and small batches) or "bn" (for
# training from scratch).
_C.MODEL.RESNET.NORM = "frozen_bn"

_C.MODEL.MOBILENET = CN()
# Multiplier of all numbers of channels; 1.0 in the released models.
_C.MODEL.MOBILENET.WIDTH = 1.0

_C.MODEL.NECK = CN()
# "fpn" (the plain pyramid), "nas_fpn" (the cells of MODEL.GENOTYPE), or one of your own.
_C.MODEL.NECK.NAME = "fpn"
# Channels of every pyramid level; even.
_C.MODEL.NECK.CHANNELS = 256

_C.MODEL.HEAD = CN()
# "fcos", "retinanet", or one of your own.
_C.MODEL.HEAD.NAME = "fcos"
# "plain" (NUM_CONVS 3x3 convs) or "searched" (the head part of MODEL.GENOTYPE).
_C.MODEL.HEAD.TOWER = "plain"
# Number of convs in a plain tower.
_C.MODEL.HEAD.NUM_CONVS = 4
# Foreground probability that the freshly initialised classifier predicts everywhere.
_C.MODEL.HEAD.PRIOR_PROB = 0.01
# Focal loss: exponent gamma, and weight alpha of the foreground.
_C.MODEL.HEAD.FOCAL_GAMMA = 2.0
_C.MODEL.HEAD.FOCAL_ALPHA = 0.25

_C.MODEL.FCOS = CN()
# Upper limits, in pixels, of the largest distance from a location to the sides of its box on P3,
# P4, P5 and P6; P7 takes all larger ones.
_C.MODEL.FCOS.SIZE_LIMITS = [64, 128, 256, 512]

_C.MODEL.RETINANET = CN()
# Side of the smallest anchors on P3 in pixels; it doubles from level to level.
_C.MODEL.RETINANET.ANCHOR_SIZE = 32
# Number of anchor sizes per level: the smallest times 2 ** (k / SCALES_PER_OCTAVE), k = 0, 1, ...
_C.MODEL.RETINANET.SCALES_PER_OCTAVE = 3
# Height / width of the anchors.
_C.MODEL.RETINANET.ASPECT_RATIOS = [0.5, 1.0, 2.0]
# IoU with a box from which an anchor is foreground, and below which it is background; anchors in
# between are ignored.
_C.MODEL.RETINANET.FG_IOU = 0.5
_C.MODEL.RETINANET.BG_IOU = 0.4
# Error (in units of the box code) at which the smooth L1 loss turns from quadratic to linear.
_C.MODEL.RETINANET.SMOOTH_L1_BETA = 0.11
# The box loss is divided by this.
_C.MODEL.RETINANET.BOX_LOSS_DIVISOR = 4.0

# ------------------------------------------------------------------------------------------ input
_C.INPUT = CN()
# Images are resized to a short side of MIN_SIZE pixels, or less where the long side would exceed
# MAX_SIZE. Training draws one of several short sides for each image.
_C.INPUT.MIN_SIZE_TRAIN = (800,)
_C.INPUT.MAX_SIZE_TRAIN = 1333
# (low, high): training draws the short side from this range instead. Empty: off.
_C.INPUT.MIN_SIZE_RANGE_TRAIN = ()
_C.INPUT.MIN_SIZE_TEST = 800
_C.INPUT.MAX_SIZE_TEST = 1333
# Probability of a left-right flip in training.
_C.INPUT.FLIP_PROB = 0.5
# Colour jitter in training; 0: off. The factors of brightness, contrast and saturation are drawn
# from 1 - x .. 1 + x, the shift of the hue from -x .. x (1 is the whole colour circle).
_C.INPUT.BRIGHTNESS = 0.0
_C.INPUT.CONTRAST = 0.0
_C.INPUT.SATURATION = 0.0
_C.INPUT.HUE = 0.0

# ------------------------------------------------------------------------------------------- data
_C.DATASETS = CN()
# Names of data sets: built in ("coco_2017_train", "coco_2017_val", "coco_2017_test_dev",
# "voc_2007_trainval", "voc_2012_train", ...) or defined under DATASETS.CUSTOM. Several training
# sets are joined; each test set is tested by itself.
_C.DATASETS.TRAIN = ("coco_2017_train",)
_C.DATASETS.TEST = ("coco_2017_val",)
# Folder that holds the built-in data sets (coco/, voc/), and to which paths of custom data sets are
# relative. Empty: the environment variable NASFCOS_DATA, else "datasets".
_C.DATASETS.ROOT = ""
# Your own data sets: NAME: {FORMAT: coco, IMAGES: folder, ANNOTATIONS: file.json, CLASSES: [a, b]},
# or NAME: {FORMAT: voc, IMAGES: folder, ANNOTATIONS: folder of XML files, SPLIT: list.txt,
# CLASSES: [a, b]}. Without CLASSES, the classes follow from the annotations.
_C.DATASETS.CUSTOM = CN(new_allowed=True)
# Number of images that may be missing or broken; each is logged and skipped. More are an error.
_C.DATASETS.MAX_BAD_IMAGES = 10

_C.DATALOADER = CN()
# Worker processes that load images, per process of the job.
_C.DATALOADER.NUM_WORKERS = 2
# Batches are padded to a multiple of this many pixels.
_C.DATALOADER.SIZE_DIVISIBILITY = 32
# Batch images of the same orientation (portrait or landscape), for less padding.
_C.DATALOADER.ASPECT_RATIO_GROUPING = True
# True: drop images without boxes from training (as the release); False: train on them as
# background.
_C.DATALOADER.SKIP_EMPTY = True

# ------------------------------------------------------------------------------------------ solver
_C.SOLVER = CN()
# "sgd" or "adamw".
_C.SOLVER.OPTIMIZER = "sgd"
# Learning rate after the warmup; it is not scaled with IMS_PER_BATCH.
_C.SOLVER.BASE_LR = 0.01
# Momentum of SGD, or beta1 of AdamW.
_C.SOLVER.MOMENTUM = 0.9
# AdamW only; lower it for schedules under a few thousand iterations (0.999 averages over about a
# thousand).
_C.SOLVER.BETA2 = 0.999
# Weight decay of all trained parameters except biases.
_C.SOLVER.WEIGHT_DECAY = 1e-4
# Biases: factor on the learning rate, and their own weight decay.
_C.SOLVER.BIAS_LR_FACTOR = 2.0
_C.SOLVER.WEIGHT_DECAY_BIAS = 0.0
# Learning rate: "step" multiplies it by GAMMA at each iteration of STEPS; "cosine" lowers it along
# half a cosine to zero at MAX_ITER.
_C.SOLVER.SCHEDULE = "step"
_C.SOLVER.GAMMA = 0.1
_C.SOLVER.STEPS = (60000, 80000)
# Iterations (optimizer steps) of the whole training.
_C.SOLVER.MAX_ITER = 90000
# During the first WARMUP_ITERS iterations the learning rate has an additional factor: constantly
# WARMUP_FACTOR ("constant"), or rising from it to 1 ("linear").
_C.SOLVER.WARMUP_METHOD = "linear"
_C.SOLVER.WARMUP_FACTOR = 1.0 / 3
_C.SOLVER.WARMUP_ITERS = 500
# Images per optimizer step, over all processes and gradient-accumulation steps.
_C.SOLVER.IMS_PER_BATCH = 16
# Gradient-accumulation steps per optimizer step; IMS_PER_BATCH is divided by it. More need less
# memory and more time.
_C.SOLVER.ACCUMULATE = 1
# Norm to which the gradient is clipped; 0: no clipping.
_C.SOLVER.CLIP_GRAD_NORM = 0.0
# Mixed precision: "off", "bf16" or "fp16" (with loss scaling, on GPUs).
_C.SOLVER.AMP = "off"
# Iterations between checkpoints, and the number of them that are kept (besides the final one).
_C.SOLVER.CHECKPOINT_PERIOD = 2500
_C.SOLVER.KEEP_CHECKPOINTS = 3
# Iterations between lines in the log and in metrics.jsonl.
_C.SOLVER.LOG_PERIOD = 20

# -------------------------------------------------------------------------------------------- test
_C.TEST = CN()
# Images per batch, over all processes.
_C.TEST.IMS_PER_BATCH = 8
# Data type of weights and activations in testing and prediction: "float32", "bfloat16" or "float16"
# (on GPUs). The latter two are faster where the device multiplies them faster.
_C.TEST.DTYPE = "float32"
# Iterations between evaluations while training; 0: only at the end.
_C.TEST.EVAL_PERIOD = 0
# Predictions with this class probability or a lower one are dropped before NMS.
_C.TEST.SCORE_THRESHOLD = 0.05
# Number of predictions per level and image, best first, that are passed to NMS.
_C.TEST.PRE_NMS_TOP_N = 1000
# IoU from which on NMS drops the lower-scoring of two boxes of the same class.
_C.TEST.NMS_IOU = 0.6
# Largest number of detections per image, apart from ties with the last one.
_C.TEST.DETECTIONS_PER_IMAGE = 100

# ------------------------------------------------------------------------------------------ search
_C.SEARCH = CN()
# The stages of the search, in this order: "fpn" (with the plain head) and "head" (on the best FPN
# found, or on the cells of MODEL.GENOTYPE if the FPN is not searched).
_C.SEARCH.STAGES = ("fpn", "head")
# Fraction of the training images that rewards trials (meta-val); the rest (meta-train) trains them.
_C.SEARCH.META_VAL = 0.3
# Start from MODEL.GENOTYPE: it is the first trial of each stage, evolution breeds from it, and in
# the end it is trained in full as well, so that the result is never worse than it on the images
# that select.
_C.SEARCH.FROM_GENOTYPE = False

_C.SEARCH.SPACE = CN()
# Number of FPN cells (at least three), and the operations and aggregations to choose from. All are:
# FPN_OPS sep_conv_3x3, sep_conv_3x3_dil3, sep_conv_5x5_dil6, skip_connect, def_conv_3x3;
# AGGREGATIONS psum, cat.
_C.SEARCH.SPACE.CELLS = 7
_C.SEARCH.SPACE.FPN_OPS = FPN_OPS
_C.SEARCH.SPACE.AGGREGATIONS = AGGREGATIONS
# Number of head layers, and the operations to choose from. All are: conv1x1, conv3x3, sep_conv_3x3,
# sep_conv_3x3_dil3, skip_connect, def_conv_3x3.
_C.SEARCH.SPACE.HEAD_LAYERS = 6
_C.SEARCH.SPACE.HEAD_OPS = HEAD_OPS

# Before the search, the backbone is fine-tuned once, with the plain FPN and the plain head.
_C.SEARCH.PREPARE = CN()
# Weights of a detector (or backbone) to use instead of fine-tuning, in the forms of MODEL.WEIGHT.
_C.SEARCH.PREPARE.WEIGHT = ""
# KEY VALUE pairs for the fine-tuning, as on the command line.
_C.SEARCH.PREPARE.OVERRIDES = []

# The backbone's feature maps of every image, computed once.
_C.SEARCH.CACHE = CN()
# Images are resized to this short side and cropped to a square of it, in pixels.
_C.SEARCH.CACHE.SIZE = 384
# Number of random crops of each meta-train image; meta-val images have one, in the centre.
_C.SEARCH.CACHE.CROPS = 1
# Folder that holds the files. Empty: "cache" in OUTPUT_DIR.
_C.SEARCH.CACHE.FOLDER = ""

# A trial trains the decoder (FPN and head) of one genotype on the cached maps of meta-train. Its
# reward is the negative sum of the losses on meta-val.
_C.SEARCH.PROXY = CN()
# Channels of FPN and head in the trials of the FPN stage and of the head stage; even.
_C.SEARCH.PROXY.FPN_CHANNELS = 64
_C.SEARCH.PROXY.HEAD_CHANNELS = 128
# Training iterations of a trial, images per iteration, and learning rate of Adam.
_C.SEARCH.PROXY.ITERATIONS = 300
_C.SEARCH.PROXY.BATCH = 200
_C.SEARCH.PROXY.LR = 8e-4
# Decay of the moving average of the weights (Polyak averaging), which is evaluated; 0: off.
_C.SEARCH.PROXY.POLYAK = 0.9
# Mixed precision: "off" or "bf16".
_C.SEARCH.PROXY.AMP = "off"
# Iterations for which the best FPN is trained before its outputs are cached for the head stage.
_C.SEARCH.PROXY.NECK_ITERATIONS = 900

# Number of trials in each stage.
_C.SEARCH.TRIALS = CN()
_C.SEARCH.TRIALS.FPN = 2800
_C.SEARCH.TRIALS.HEAD = 600

# "ppo", "random" or "evolution".
_C.SEARCH.STRATEGY = "ppo"
# Number of architectures that the strategy proposes at a time, before it learns from their rewards.
_C.SEARCH.BATCH = 20

_C.SEARCH.PPO = CN()
# Size of the controller's LSTM state and embeddings, and learning rate of Adam.
_C.SEARCH.PPO.HIDDEN = 64
_C.SEARCH.PPO.LR = 1e-2
# Passes over each batch, and the clipping range of the probability ratio.
_C.SEARCH.PPO.EPOCHS = 5
_C.SEARCH.PPO.CLIP = 0.2
# Weight of the entropy bonus, and decay of the moving mean of rewards (the baseline).
_C.SEARCH.PPO.ENTROPY = 0.02
_C.SEARCH.PPO.BASELINE_DECAY = 0.9
# Norm to which the gradient is clipped; 0: no clipping.
_C.SEARCH.PPO.CLIP_GRAD_NORM = 1.0

_C.SEARCH.EVOLUTION = CN()
# A parent is the best of TOURNAMENT architectures drawn from the latest POPULATION ones.
_C.SEARCH.EVOLUTION.POPULATION = 20
_C.SEARCH.EVOLUTION.TOURNAMENT = 10

# A second objective: the strategy maximises reward - WEIGHT * max(0, cost / TARGET - 1), with
# TARGET_HEAD instead of TARGET in the head stage. The cost is that of what a trial trains (the FPN
# and the plain head in the FPN stage, the head alone in the head stage) at the widths of
# SEARCH.PROXY on one crop of SEARCH.CACHE.SIZE; see the columns flops and latency of trials_*.csv.
_C.SEARCH.OBJECTIVE = CN()
# "none", "flops" (billions of multiply-adds) or "latency" (milliseconds).
_C.SEARCH.OBJECTIVE.COST = "none"
_C.SEARCH.OBJECTIVE.TARGET = 1.0
_C.SEARCH.OBJECTIVE.TARGET_HEAD = 1.0
_C.SEARCH.OBJECTIVE.WEIGHT = 0.0

# Early stopping of hopeless trials (successive halving).
_C.SEARCH.PRUNING = CN()
# Iterations (rungs) at which a trial may be stopped. Empty: every trial is trained to the end.
_C.SEARCH.PRUNING.RUNGS = ()
# Share of the trials that continue at each rung, and number of trials that must have reached the
# rung, in earlier batches, before any is stopped there.
_C.SEARCH.PRUNING.KEEP = 0.5
_C.SEARCH.PRUNING.STARTUP = 20

# Where trials run: "inline" (this process), "local" (worker processes) or "ray" (a Ray cluster).
_C.SEARCH.EXECUTOR = "inline"
# Number of parallel trials. 0: one per GPU or, without GPUs, one per CPU core.
_C.SEARCH.WORKERS = 0
# How often a trial is repeated whose worker died.
_C.SEARCH.RETRIES = 2
# Kill and retry a trial after this many seconds ("local" and "ray"). 0: no limit. With a limit,
# which trials fail can depend on the machine's speed.
_C.SEARCH.TRIAL_TIMEOUT = 0
# Least number of seconds between two updates of the report.
_C.SEARCH.REPORT_PERIOD = 60

# The best architectures of a stage are trained in full, as by tools/train_net.py.
_C.SEARCH.SELECT = CN()
# The best CANDIDATES trials (at least SELECT.FPN/HEAD) are re-evaluated RETRIALS times with other
# seeds and re-ranked by the mean of the new rewards, because the maximum of many noisy rewards is
# biased. RETRIALS 0: off.
_C.SEARCH.SELECT.CANDIDATES = 20
_C.SEARCH.SELECT.RETRIALS = 2
# How many FPNs and heads are trained in full. FPN 1 with a head stage to follow: the best FPN is
# used without full training.
_C.SEARCH.SELECT.FPN = 20
_C.SEARCH.SELECT.HEAD = 10
# Full trainings per architecture (SEED, SEED+1, ...), ranked by mean AP; on small data the AP of a
# single training says little. If one diverges, the architecture is dropped.
_C.SEARCH.SELECT.SEEDS = 1
# KEY VALUE pairs for the full training, as on the command line.
_C.SEARCH.SELECT.OVERRIDES = []

# -------------------------------------------------------------------------------------------- rest
# Seed of initial weights, data order and augmentation. -1: a random one for each run, which is
# logged.
_C.SEED = 0
# Folder for everything that a run writes.
_C.OUTPUT_DIR = "output"


def get_defaults() -> CN:
    """A new copy of the default tree, which may be changed."""
    return _C.clone()
