"""Settings: layers, strict keys, types, and the way back from config.yaml."""

from __future__ import annotations

import pytest
import yaml

from zoo.core.errors import UsageError
from zoo.core.job.flags import FLAGS, from_flags
from zoo.core.job.job import Job
from zoo.core.job.written import read_file


def job(**flags):
    return Job.from_settings(*from_flags("llama3", flags))


def test_a_flag_goes_over_set_over_file(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("optim: {lr: 1.0e-5, clip: 2.0}\nschedule: {steps: 7, warmup: 3}\ndata: {seq: 4k}\n")
    made = job(c=str(file), set=("optim.lr=2e-5", "schedule.steps=8"), lr="3e-5")
    assert (made.optim.lr, made.schedule.steps, made.schedule.warmup) == (3e-5, 8, 3)
    assert (made.optim.clip, made.data.seq) == (2.0, 4096)


def test_a_file_does_not_hold_on_to_a_layout_that_flags_change(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("layout: {cp: 2, cp_scheme: ring, dp_shard: 4, pp: 1}\n")
    assert job(c=str(file), cp="1").layout.cp_scheme == "auto"
    assert job(c=str(file), cp="1", cp_scheme="ring").layout.cp_scheme == "ring"
    assert job(c=str(file)).layout.cp_scheme == "ring"
    chosen = job(c=str(file), layout="auto", tp="2").layout
    assert (chosen.cp, chosen.dp_shard, chosen.pp, chosen.tp, chosen.cp_scheme) == (None, None, None, 2, "ring")


def test_every_flag_names_a_setting_that_exists():
    known = {f"{s}.{k}" for s, part in Job().settings().items() for k in part}
    optional = {"model.size", "model.from", "data.path", "data.global_batch", "data.format", "data.overlong"}
    optional |= {"data.chat_template", "layout.degrees", "layout.pp_virtual", "checkpoint.out", "launch.nproc"}
    optional |= {f"layout.{axis}" for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")}
    assert {flag.key for flag in FLAGS} <= known | optional


def test_settings_come_back_the_same_through_yaml():
    made = job(seq="64k", cp="8", track="tensorboard", set=("model.rope_theta=1e6", "optim.lr=1e-4"))
    again = Job.from_plain(yaml.safe_load(yaml.safe_dump(made.settings())))
    assert again.settings() == made.settings()
    assert again.log.track == ("tensorboard",)
    assert again.model.overrides == {"rope_theta": 1e6}


@pytest.mark.parametrize("typed", ["20261126_01", "007", "1e5", "1.50", "no", "0x1f", "2026-11-26", "1:30", "nan"])
def test_a_text_is_the_text_that_was_typed_whatever_yaml_makes_of_it(typed, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(f"checkpoint: {{out: {typed}}}\nlog: {{track: {typed}}}\n")
    said = ({"c": str(file)}, {"set": (f"checkpoint.out={typed}", f"log.track={typed}")}, {"out": typed})
    for made in (job(seq="4k", **flags) for flags in said):
        assert made.checkpoint.out == typed
        assert Job.from_plain(yaml.safe_load(yaml.safe_dump(made.settings()))).checkpoint.out == typed
        assert made.log.track in ((typed,), ())


def test_a_quoted_text_has_no_quotes_and_null_is_none(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("checkpoint: {out: '007'}\nmodel: {size: null, rope_theta: 1e6}\n")
    made = job(c=str(file), set=("data.path='no'", "data.format=null"))
    assert (made.checkpoint.out, made.model.size, made.data.path, made.data.format) == ("007", None, "no", None)
    assert made.model.overrides == {"rope_theta": 1e6}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"set": ("optim.lrr=1",)}, ["optim.lrr", "optim.lr", "--set"]),
        ({"set": ("optin.lr=1",)}, ["optin", "optim"]),
        ({"set": ("optim.lr",)}, ["section.key=value"]),
        ({"set": ("optim.lr=fast",)}, ["fast", "number"]),
        ({"steps": "1.5"}, ["--steps", "1.5", "whole number"]),
        ({"steps": "many"}, ["--steps", "many"]),
        ({"seq": "64q"}, ["64q", "64k"]),
        ({"seq": "-1"}, ["-1"]),
        ({"sequence": 8}, ["sequence", "seq"]),
        ({"c": "nowhere.yaml"}, ["nowhere.yaml"]),
    ],
)
def test_what_cannot_be_read_is_one_line_that_says_what_to_type(flags, words):
    with pytest.raises(UsageError) as caught:
        job(**flags)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_file_with_an_unknown_key_names_the_file(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("schedule: {lr_warmpu: 3}\n")
    with pytest.raises(UsageError, match=r"schedule.lr_warmpu.*job.yaml"):
        job(c=str(file))


def test_a_file_that_is_not_sections_is_refused(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("- 1\n- 2\n")
    with pytest.raises(UsageError, match="sections"):
        read_file(file)


def test_numbers_may_be_written_as_people_write_them():
    assert job(set=("optim.lr=1e-4", "model.rope_theta=1e6")).model.overrides == {"rope_theta": 1e6}
    assert job(set=("optim.lr=1e-4",)).optim.lr == 1e-4
    assert job(seq="1M").data.seq == 1_048_576
