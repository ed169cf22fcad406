import json
import logging

import pytest
import torch

from nasfcos.engine.metrics import Meter, MetricsWriter, format_duration


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_file_goes_on_where_the_checkpoint_was(tmp_path, caplog):
    with MetricsWriter(tmp_path) as writer:
        for iteration in (2, 4, 6):
            writer.write(iteration, {"loss": 1.0 / iteration})
        writer.write(4, {"eval/val/AP": 0.5})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 8, "lo')  # killed while writing
    with caplog.at_level(logging.WARNING, logger="nasfcos"):
        with MetricsWriter(tmp_path, start=4) as writer:
            assert [writer.has_evaluation(i) for i in (2, 4)] == [False, True]
            writer.write(6, {"loss": 9.0})
    assert [(line["iteration"], line.get("loss")) for line in lines(path)] == [
        (2, 0.5), (4, 0.25), (4, None), (6, 9.0)
    ]  # fmt: skip
    assert "incomplete" in caplog.text
    assert list(tmp_path.glob("tensorboard/events*"))


def test_a_new_run_begins_a_new_file(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan")})
    assert lines(tmp_path / "metrics.jsonl") == [{"iteration": 1, "loss": None}]


def test_the_meter_gives_means_since_its_last_reading(monkeypatch):
    clock = iter([0.0, 10.0, 10.0, 26.0, 26.0])
    monkeypatch.setattr("nasfcos.engine.metrics.time.perf_counter", lambda: next(clock))
    meter = Meter(images_per_iteration=8, device=torch.device("cpu"))
    for cls, box, waited in ((1.0, 4.0, 1.0), (3.0, 2.0, 0.5)):
        meter.add({"loss_cls": torch.tensor(cls), "loss_box": torch.tensor(box)}, waited)
    meter.pause(2.0)
    figures = meter.read()
    assert {k: figures[k] for k in ("loss", "loss_cls", "loss_box")} == {
        "loss": 5.0, "loss_cls": 2.0, "loss_box": 3.0
    }  # fmt: skip
    assert (figures["time"], figures["data_time"], figures["images_per_s"]) == (4.0, 0.75, 2.0)
    assert figures["memory_mb"] > 10
    meter.add({"loss_cls": torch.tensor(7.0)}, 0.0)
    figures = meter.read()
    assert (figures["loss"], figures["time"]) == (7.0, 16.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "00:00:00"), (3723, "01:02:03"), (90061, "1 d 01:01:01")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
