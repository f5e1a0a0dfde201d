"""metrics.jsonl over restarts, and units."""

from __future__ import annotations

import json

import pytest

from zoo.core.humanize import format_count, format_seconds, format_tokens, parse_tokens
from zoo.core.run.metrics import MetricsFile, read_metrics


def test_a_resumed_run_writes_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lo')
    file = MetricsFile(path, first_step=3)
    for step in (3, 4):
        file.write({"step": step, "loss": 0.1 + 0.2})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] == 0.1 + 0.2


@pytest.mark.parametrize(
    ("text", "count"), [("64k", 65536), ("1M", 1 << 20), ("1000", 1000), ("1.5k", 1536), (512, 512)]
)
def test_tokens_are_read_in_powers_of_two(text, count):
    assert parse_tokens(text) == count


def test_numbers_are_written_as_they_are_read():
    assert [format_tokens(n) for n in (65536, 1 << 20, 1000)] == ["64k", "1M", "1000"]
    assert [format_seconds(s) for s in (5, 65, 4150)] == ["5s", "1m05s", "1h09m"]
    assert format_count(8_030_261_248) == "8.03B"
