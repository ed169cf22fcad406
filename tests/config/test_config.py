import json
import logging
from pathlib import Path

import pytest
import yaml

from nasfcos.config import ConfigError, get_defaults, load_config, override_config
from nasfcos.config.inheritance import ordinary_base
from nasfcos.config.tree import get_setting, with_settings
from nasfcos.genotype import Genotype
from tests.known import GOLDEN, ROOT

RELEASED = json.loads((GOLDEN / "configs.json").read_text())
SEARCH = ROOT / "configs" / "search"
# Settings in which our configs differ from the released files on purpose.
OWN_CHOICE = {"MODEL.WEIGHT", "OUTPUT_DIR"}


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_released(tree):
    """The released tree as in its YAML files, where tuples are text."""
    if isinstance(tree, dict) and list(tree) == ["tuple"]:
        return "(" + "".join(f"{item!r}," for item in tree["tuple"]) + ")"
    if isinstance(tree, dict):
        return {key: as_released(value) for key, value in tree.items()}
    return tree


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda p: p.stem)
def test_every_config_loads(path):
    assert load_config(path).is_frozen()


@pytest.mark.parametrize("name", RELEASED)
def test_released_file_means_the_same_as_ours(name, tmp_path, caplog):
    path = write(tmp_path, f"{name}.yaml", yaml.safe_dump(as_released(RELEASED[name])))
    with caplog.at_level(logging.INFO):
        released = dict(leaves(load_config(path)))
    assert "MODEL.BACKBONE.CONV_BODY" in caplog.text and "translated" in caplog.text
    ours = dict(leaves(load_config(SEARCH / f"{name}.yaml", ["MODEL.NUM_CLASSES", 80])))
    cells = released.pop("MODEL.GENOTYPE")
    assert cells == ours.pop("MODEL.GENOTYPE")[: len(cells)]
    assert {k: v for k, v in released.items() if k not in OWN_CHOICE} == {
        k: v for k, v in ours.items() if k not in OWN_CHOICE
    }
    assert released["MODEL.WEIGHT"] == RELEASED[name]["MODEL"]["WEIGHT"]


def test_released_file_with_an_unknown_key(tmp_path):
    tree = as_released(RELEASED["R_50_NAS_head"])
    tree["SOLVER"]["STEPZ"] = 1
    path = write(tmp_path, "released.yaml", yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"released\.yaml.*SOLVER\.STEPZ.*SOLVER\.STEPS"):
        load_config(path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.DENSEBOX_ON", False, "neither MODEL.DENSEBOX_ON nor MODEL.RETINANET_ON is True"),
        ("MODEL.BACKBONE.CONV_BODY", None, "known are MobileNetV2"),
        ("MODEL.RETINANET.NUM_CLASSES", 1, "the background counts"),
        ("MODEL.DENSEBOX_ON", "maybe", "MODEL.DENSEBOX_ON is 'maybe': it must be true or false"),
        ("MODEL.RETINANET.USE_C5", "on", "only False is supported"),
        ("SEARCH.DECODER.NUM_CELLS", 5, "NUM_CELLS is 5, but SEARCH.DECODER.CONFIG has 7"),
        ("SEARCH.HEAD.NUM_HEAD_LAYERS", 9, "NUM_HEAD_LAYERS is 9, but .* has 6"),
    ],
)
def test_released_file_with_an_impossible_value(tmp_path, key, value, message):
    tree = as_released(RELEASED["R_50_NAS_head"])
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[last] = value
    tree["DATALOADER"] = None  # an empty section is valid
    path = write(tmp_path, "released.yaml", yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=rf"released\.yaml.*{message}"):
        load_config(path)


def test_switches_of_released_files_are_those_of_yaml_1_1(tmp_path):
    text = yaml.safe_dump(as_released(RELEASED["R_50_NAS_head"]))
    for old, new in (("DENSEBOX_ON: true", "DENSEBOX_ON: Yes\n  RETINANET_ON: no"),
                     ("NAS_HEAD_ON: true", "NAS_HEAD_ON: off")):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    cfg = load_config(write(tmp_path, "released.yaml", text))
    assert (cfg.MODEL.HEAD.NAME, cfg.MODEL.HEAD.TOWER) == ("fcos", "plain")


def test_settings_of_own_parts_are_of_any_type(tmp_path):
    text = "MODEL: {IMPORTS: parts, CUSTOM: {W: null, D: 1, S: [1, 2], DEEP: {LR: 1e-3}}}\n"
    path = write(tmp_path, "own.yaml", text)
    overrides = ["MODEL.CUSTOM.W", "big", "MODEL.CUSTOM.D", "0.5", "MODEL.CUSTOM.S", "[0.5]",
                 "MODEL.CUSTOM.NEW", "3", "MODEL.CUSTOM.FLAG", "True"]  # fmt: skip
    cfg = load_config(path, overrides)
    assert cfg.MODEL.IMPORTS == ("parts",)
    own = cfg.MODEL.CUSTOM
    assert (own.W, own.D, own.S, own.NEW, own.FLAG) == ("big", 0.5, [0.5], 3, True)
    assert own.DEEP.LR == 1e-3 and load_config(path).MODEL.CUSTOM.W is None
    # A folder may have a number as its name.
    assert load_config(None, ["DATASETS.CUSTOM.a.IMAGES", "5"]).DATASETS.CUSTOM.a.IMAGES == "5"


def test_inheritance_and_overrides(tmp_path):
    write(tmp_path, "base.yaml", "SOLVER:\n  BASE_LR: 1e-3\n  MAX_ITER: 7\n  AMP: off\n")
    path = write(tmp_path, "child.yaml", "_BASE_: base.yaml\nSOLVER:\n  MAX_ITER: 8\n")
    cfg = load_config(path, ["SOLVER.STEPS", "(5, 6)", "TEST.NMS_IOU", "1", "OUTPUT_DIR", "out"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (1e-3, 8, (5, 6))
    assert cfg.SOLVER.AMP == "off"
    assert cfg.TEST.NMS_IOU == 1.0 and isinstance(cfg.TEST.NMS_IOU, float)
    assert cfg.OUTPUT_DIR == load_config(None, ["OUTPUT_DIR", Path("out")]).OUTPUT_DIR == "out"
    assert load_config(None) == get_defaults()
    assert load_config(None, ["DATASETS.TEST", "mine"]).DATASETS.TEST == ("mine",)


def test_custom_data_sets_are_free_form(tmp_path):
    cfg = load_config(None, ["DATASETS.CUSTOM.mine.FORMAT", "coco"])
    assert cfg.DATASETS.CUSTOM.mine.FORMAT == "coco"
    path = write(tmp_path, "numbers.yaml", "DATASETS: {CUSTOM: {5: {FORMAT: coco}}}\n")
    cfg = load_config(path, ["DATASETS.CUSTOM.5.IMAGES", "five"])
    assert cfg.DATASETS.CUSTOM == {"5": {"FORMAT": "coco", "IMAGES": "five"}}


def test_types_do_not_depend_on_what_a_file_leaves_empty(tmp_path):
    lists = "SOLVER: {STEPS: []}\nDATASETS: {TEST: []}\nINPUT: {MIN_SIZE_TRAIN: []}\n"
    path = write(tmp_path, "file.yaml", lists)
    good = ["SOLVER.STEPS", "100", "DATASETS.TEST", "coco_2017_val", "INPUT.MIN_SIZE_TRAIN", "800"]
    cfg = load_config(path, good)
    assert cfg.SOLVER.STEPS == (100,) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (800,)
    for key, value, kind in (
        ("SOLVER.STEPS", "('x',)", "int"),
        ("SOLVER.STEPS", "(1.5,)", "int"),
        ("DATASETS.TEST", "[3]", "str"),
    ):
        with pytest.raises(ConfigError, match=rf"command line: {key} must be tuple of {kind}"):
            load_config(path, [*good, key, value])


def test_a_genotype_may_be_of_tuples():
    as_tuples = "(((0, 1, 0, 0, 0),), ((1, 2, 0, 0, 0),), ((2, 3, 0, 0, 0),))"
    cfg = load_config(SEARCH / "R_50_NAS_densebox.yaml", ["MODEL.GENOTYPE", as_tuples])
    assert len(Genotype.parse(cfg.MODEL.GENOTYPE).cells) == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL:\n  WEIGTH: x\n", r"file\.yaml.*'MODEL\.WEIGTH'.*'MODEL\.WEIGHT'"),
        ("SOLVER:\n  NMS_IOU: 1\n", r"file\.yaml.*'SOLVER\.NMS_IOU'.*'TEST\.NMS_IOU'"),
        ("SOLVER:\n  LR: 1\n", r"'SOLVER\.LR'.*Did you mean 'SOLVER\.BASE_LR'"),
        ("model:\n  weight: x\n", r"'model\.weight'.*Did you mean 'MODEL\.WEIGHT'"),
        ("MODEL:\n  FPN:\n    CHANNELS: 8\n", r"'MODEL\.FPN\.CHANNELS'.*'MODEL\.NECK\.CHANNELS'"),
        ("OUTPUT: x\n", r"'OUTPUT'.*Did you mean 'OUTPUT_DIR'"),
        ("CELLS: 5\n", r"'CELLS'.*Did you mean 'SEARCH\.SPACE\.CELLS'"),
        (
            "DATASETS:\n  CUSTM:\n    mine: {FORMAT: coco}\n",
            r"'DATASETS\.CUSTM\.mine\.FORMAT'.*Did you mean 'DATASETS\.CUSTOM'",
        ),
        ("SOLVER:\n  BASE_LR: fast\n", r"file\.yaml: SOLVER\.BASE_LR must be float"),
        ("SOLVER:\n  MAX_ITER: 1.5\n", r"file\.yaml: SOLVER\.MAX_ITER must be int"),
        ("SOLVER:\n  MAX_ITER: true\n", r"file\.yaml: SOLVER\.MAX_ITER must be int"),
        ("SOLVER:\n  STEPS: [1, a]\n", r"file\.yaml: SOLVER\.STEPS must be tuple of int"),
        ("SOLVER: 3\n", r"file\.yaml: SOLVER is a section"),
        ("SOLVER:\n  AMP: fp32\n", r"file\.yaml: SOLVER\.AMP is 'fp32'.*'off', 'bf16', 'fp16'"),
        ("TEST:\n  IMS_PER_BATCH: 0\n", r"file\.yaml: TEST\.IMS_PER_BATCH.*at least 1"),
        ("MODEL:\n  NECK:\n    NAME: nas_fpn\n", r"MODEL\.GENOTYPE is empty.*nas_fpn"),
        (
            "MODEL:\n  GENOTYPE: [[[7, 0, 0, 0, 0]]]\n",
            r"file\.yaml: MODEL\.GENOTYPE is invalid: cell 0, input 0 is 7",
        ),
        ("MODEL: [\n", r"file\.yaml is not valid YAML"),
        ("- 1\n", r"file\.yaml must hold keys and values"),
        ("_BASE_: file.yaml\n", "inherits in a circle"),
        ("_BASE_: 5\n", r"file\.yaml: _BASE_ must be a file name"),
        ("INPUT:\n  MIN_SIZE_TRAIN: [0]\n", r"INPUT\.MIN_SIZE_TRAIN.*positive"),
        ("INPUT:\n  MIN_SIZE_RANGE_TRAIN: [9, 8]\n", r"MIN_SIZE_RANGE_TRAIN.*low comes first"),
        ("INPUT:\n  MIN_SIZE_RANGE_TRAIN: [a, b]\n", r"MIN_SIZE_RANGE_TRAIN must be tuple of int"),
        ("SEARCH:\n  PRUNING:\n    RUNGS: [5.5]\n", r"PRUNING\.RUNGS must be tuple of int"),
        ("MODEL:\n  BACKBONE:\n    FREEZE_AT: -1\n", r"BACKBONE\.FREEZE_AT.*at least 0"),
        ("MODEL:\n  MOBILENET:\n    WIDTH: 0.0\n", r"MOBILENET\.WIDTH.*positive"),
        ("MODEL:\n  RETINANET:\n    BG_IOU: 0.6\n", r"RETINANET\.BG_IOU is above FG_IOU"),
        ("SOLVER:\n  GAMMA: 0.1\nSOLVER:\n  GAMMA: 0.2\n", r"file\.yaml.*'SOLVER' appears twice"),
        ("OUTPUT_DIR: {{root}}\n", r"file\.yaml is not valid YAML.*needs quotes"),
        ("? [a]\n: 1\n", r"file\.yaml is not valid YAML.*needs quotes"),
        ("5: 1\n", r"file\.yaml: there is no key '5'"),
        ("MODEL:\n  RETINANET:\n    ASPECT_RATIOS: []\n", r"ASPECT_RATIOS is empty"),
        ("OUTPUT_DIR: 2024-02-30\n", r"file\.yaml is not valid YAML"),
        ("MODEL:\n  NECK:\n    CHANNELS: 33\n", r"NECK\.CHANNELS is 33.*even"),
        ("MODEL:\n  FCOS:\n    SIZE_LIMITS: [9, 8, 7, 6]\n", r"SIZE_LIMITS.*rise from P3"),
        ("INPUT:\n  HUE: 0.9\n", r"INPUT\.HUE is 0\.9"),
        ("SEED: 99999999999999999999\n", r"SEED is 9{20}.*-1 or"),
        ("TEST:\n  NMS_IOU: -1\n", r"TEST\.NMS_IOU.*0\.\.1"),
        ("SOLVER:\n  BASE_LR: 1e400\n", r"SOLVER\.BASE_LR"),
        ("SOLVER: {OPTIMIZER: adamw, BETA2: 1}\n", r"file\.yaml: SOLVER\.BETA2 is 1.*below 1"),
        (f"SOLVER:\n  BASE_LR: 1{400 * '0'}\n", r"file\.yaml: SOLVER\.BASE_LR must be float"),
        ("OUTPUT_DIR: ''\n", r"file\.yaml: OUTPUT_DIR is empty"),
        ("MODEL: {BACKBONE: {FREEZE_AT: 6}}\n", r"file\.yaml: MODEL\.BACKBONE\.FREEZE_AT is 6"),
        ("MODEL: {RETINANET: {FG_IOU: 0.3}}\n", r"file\.yaml: MODEL\.RETINANET\.BG_IOU is above"),
        (
            "DATASETS: {CUSTOM: {parts_v1.2: {FORMAT: coco}}}\n",
            r"file\.yaml: the name 'parts_v1\.2' in DATASETS\.CUSTOM must have no dot",
        ),
        (
            "DATASETS: {CUSTOM: {mine: {FROMAT: coco}}}\n",
            r"file\.yaml: DATASETS\.CUSTOM\.mine\.FROMAT is unknown.*Did you mean 'FORMAT'",
        ),
        (
            "DATASETS: {CUSTOM: {mine: {format: coco}}}\n",
            r"file\.yaml: DATASETS\.CUSTOM\.mine\.format is unknown.*Did you mean 'FORMAT'",
        ),
        (
            "DATASETS: {CUSTOM: {mine: {FORMAT: cocoo}}}\n",
            r"file\.yaml: DATASETS\.CUSTOM\.mine\.FORMAT is 'cocoo'.*Did you mean 'coco'",
        ),
        ("DATASETS: {CUSTOM: {mine: x.json}}\n", r"file\.yaml: DATASETS\.CUSTOM\.mine must be a"),
        ("MODEL: {CUSTOM: {a: {b.c: 1}}}\n", r"'b\.c' in MODEL\.CUSTOM\.a must have no dot"),
        ("MODEL: {IMPORTS: [my/parts.py]}\n", r"file\.yaml: MODEL\.IMPORTS has 'my/parts\.py'"),
        ("MODEL: {IMPORTS: [.x]}\n", r"file\.yaml: MODEL\.IMPORTS has '\.x'"),
        ("MODEL: {IMPORTS: [3]}\n", r"file\.yaml: MODEL\.IMPORTS must be tuple of str"),
        ("SOLVER: {STEPS: [-5]}\n", r"file\.yaml: SOLVER\.STEPS is .-5.*must be positive"),
        ("MODEL:\n  HEAD:\n    PRIOR_PROB: 0.\n", r"PRIOR_PROB"),
        ("SEARCH:\n  STAGES: [head, fpn]\n", r"SEARCH\.STAGES.*on the FPN that was found"),
        ("SEARCH:\n  STAGES: [neck]\n", r"file\.yaml: SEARCH\.STAGES has 'neck'.*'fpn', 'head'"),
        (
            "SEARCH:\n  SPACE:\n    HEAD_OPS: [conv3x3, conv3x3]\n",
            r"file\.yaml: SEARCH\.SPACE\.HEAD_OPS names an entry twice",
        ),
        (
            "SEARCH:\n  SPACE:\n    FPN_OPS: [sep_conv_3x4]\n",
            r"FPN_OPS has 'sep_conv_3x4'.*Did you mean 'sep_conv_3x3'",
        ),
        ("SEARCH:\n  SPACE:\n    CELLS: 2\n", r"SEARCH\.SPACE\.CELLS.*at least 3"),
        ("SEARCH:\n  META_VAL: 1.0\n", r"SEARCH\.META_VAL is 1\.0.*between 0 and 1"),
        ("SEARCH:\n  PRUNING:\n    RUNGS: [9, 5]\n", r"PRUNING\.RUNGS.*rising order"),
        ("SEARCH:\n  PRUNING:\n    RUNGS: [300]\n", r"RUNGS.*ends at 300.*ITERATIONS = 300"),
        ("SEARCH:\n  EVOLUTION:\n    TOURNAMENT: 99\n", r"TOURNAMENT is 99.*POPULATION = 20"),
        ("SEARCH:\n  EXECUTOR: rays\n", r"SEARCH\.EXECUTOR is 'rays'.*Did you mean 'ray'"),
        ("_BASE_: gone.yaml\n", r"gone\.yaml does not exist \(named by _BASE_ of .*file\.yaml"),
    ],
)
def test_errors_name_file_key_and_remedy(tmp_path, text, message):
    path = write(tmp_path, "file.yaml", text)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(path)


def test_command_line_errors():
    with pytest.raises(ConfigError, match=r"KEY VALUE pairs"):
        load_config(None, ["SOLVER.MAX_ITER"])
    with pytest.raises(ConfigError, match=r"command line.*MAX_ITR.*SOLVER\.MAX_ITER"):
        load_config(None, ["SOLVER.MAX_ITR", "3"])
    with pytest.raises(ConfigError, match=r"'MODEL\.RETINANET\.NMS_TH'.*'TEST\.NMS_IOU'"):
        load_config(None, ["MODEL.RETINANET.NMS_TH", "0.5"])


def test_values_as_people_write_them(tmp_path):
    """A boolean as in YAML, one value for a list, an empty section."""
    path = write(tmp_path, "file.yaml", "SOLVER:\nMODEL:\n  NECK:\n")
    overrides = ["MODEL.SYNC_BN", "true", "SOLVER.STEPS", "600", "INPUT.MIN_SIZE_TRAIN", 640]
    overrides += ["SEARCH.PRUNING.RUNGS", "30"]  # whose default is empty
    cfg = load_config(path, overrides)
    assert cfg.MODEL.SYNC_BN is True
    assert cfg.SEARCH.PRUNING.RUNGS == (30,)
    assert cfg.SOLVER.STEPS == (600,) and cfg.INPUT.MIN_SIZE_TRAIN == (640,)


def test_overriding_a_tree_checks_and_leaves_it_alone():
    cfg = load_config()
    other = override_config(cfg, ["SOLVER.MAX_ITER", 5, "DATASETS.TRAIN", "a"], "there")
    assert other.SOLVER.MAX_ITER == 5 and other.DATASETS.TRAIN == ("a",) and other.is_frozen()
    assert cfg.SOLVER.MAX_ITER == 90000
    pairs = ["SOLVER.STEPS", (3, 4), "SOLVER.AMP", "bf16"]
    cfg = override_config(cfg, ["SEARCH.SELECT.OVERRIDES", ["SOLVER.MAX_ITER", 5]], "there")
    cfg = override_config(cfg, ["SEARCH.SELECT.OVERRIDES", pairs], "there")
    assert cfg.SEARCH.SELECT.OVERRIDES == pairs
    with pytest.raises(ConfigError, match=r"there.*MAX_ITR.*SOLVER\.MAX_ITER"):
        override_config(cfg, ["SOLVER.MAX_ITR", 5], "there")
    cfg = override_config(cfg, ["SEARCH.PRUNING.RUNGS", (10,)], "there")
    with pytest.raises(ConfigError, match=r"^elsewhere: SEARCH\.PRUNING\.RUNGS ends at 10"):
        override_config(cfg, ["SEARCH.PROXY.ITERATIONS", 5], "elsewhere")


def test_settings_of_a_copy():
    cfg = load_config()
    entry = {"FORMAT": "coco"}
    settings = {"SEED": 5, "MODEL.NECK.CHANNELS": 8, "DATASETS.CUSTOM.mine": entry}
    other = with_settings(cfg, settings)
    assert other.SEED == 5 and other.MODEL.NECK.CHANNELS == 8
    assert other.DATASETS.CUSTOM.mine is entry
    assert cfg == load_config() and other.is_frozen() and other.MODEL.is_frozen()
    for name in ("SEEDS", "MODEL.NECKS", "MODEL.NECKS.CHANNELS"):
        with pytest.raises(KeyError, match="SEEDS|NECKS"):
            with_settings(cfg, {name: 1})


def test_what_a_config_adds_to_the_nearest_one_without_a_search(tmp_path):
    """Names that YAML 1.1 would read as numbers or booleans stay names."""
    write(tmp_path, "plain.yaml", "SOLVER: {MAX_ITER: 3}\n")
    search = "SEARCH: {BATCH: 2}\nDATASETS: {CUSTOM: {no: {FORMAT: coco}, 0x10: {IMAGES: x}}}\n"
    write(tmp_path, "search.yaml", f"_BASE_: plain.yaml\n{search}")
    write(tmp_path, "more.yaml", "_BASE_: search.yaml\nTEST: {NMS_IOU: 0.7}\n")
    path = write(tmp_path, "mine.yaml", "_BASE_: more.yaml\nSEARCH: {BATCH: 3}\nSEED: 1\n")
    base, keys = ordinary_base(path)
    assert base == tmp_path / "plain.yaml"
    custom = ["DATASETS.CUSTOM.no.FORMAT", "DATASETS.CUSTOM.0x10.IMAGES"]
    assert keys == ["SEED", "TEST.NMS_IOU", *custom]
    assert all(get_setting(load_config(path), key) for key in keys)
    released = yaml.safe_dump(as_released(RELEASED["R_50_NAS_head"]))
    write(tmp_path, "released.yaml", f"_BASE_: plain.yaml\n{released}")
    write(tmp_path, "child.yaml", "_BASE_: released.yaml\nSOLVER:\nSEED: 4\n")
    path = write(tmp_path, "of_child.yaml", "_BASE_: child.yaml\nTEST:\nSEARCH: {BATCH: 3}\n")
    assert ordinary_base(path) == (tmp_path / "child.yaml", [])
    alone = write(tmp_path, "alone.yaml", "SEARCH: {BATCH: 3}\n")
    assert ordinary_base(alone) == (alone, [])


def test_missing_file_names_the_nearest():
    with pytest.raises(ConfigError, match=r"does not exist.*R_50_NAS_head\.yaml"):
        load_config(SEARCH / "R_50_NAS_hed.yaml")


def test_home_is_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(None, ["OUTPUT_DIR", "~/runs"]).OUTPUT_DIR == str(tmp_path / "runs")
    assert override_config(load_config(), ["OUTPUT_DIR", "~"], "test").OUTPUT_DIR == str(tmp_path)


def test_a_list_on_the_command_line_is_a_list_in_a_new_section_too():
    cfg = load_config(None, ["DATASETS.CUSTOM.own.CLASSES", "['a', 'b']"])
    assert cfg.DATASETS.CUSTOM.own.CLASSES == ["a", "b"]
    cfg = load_config(None, ["DATASETS.CUSTOM.own.IMAGES", "(photos) 1"])
    assert cfg.DATASETS.CUSTOM.own.IMAGES == "(photos) 1"
