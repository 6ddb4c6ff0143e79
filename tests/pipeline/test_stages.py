"""The stages of a pipeline: their order, what they adapt to the data, and how they are resumed."""

import json
import pathlib
import runpy
from types import SimpleNamespace

import pytest

from leon_jax.config import UserError
from leon_jax.pipeline import run as running
from leon_jax.pipeline import stages
from leon_jax.pipeline.stages import Command, Inputs, Stage
from tests import document_folders

OWN = pathlib.Path(__file__).parents[2] / "configs" / "own.py"


def own(size="tiny"):
    return runpy.run_path(str(OWN))["get_config"](size).to_dict()


def inputs(workdir, *sources):
    return Inputs(sources or ("folder:cats",), ("--licence=CC0-1.0",), workdir)


def by_name(values, workdir):
    return {stage.name: stage for stage in stages.stages(values, inputs(workdir))}


def test_stages_come_in_the_order_of_their_dependencies(tmp_path):
    assert list(by_name(own(), tmp_path)) == [
        "documents", "text", "tokenizer", "encoder", "thresholds", "encode", "decoder", "model",
    ]  # fmt: skip
    values = own()
    values["stages"]["decoder_second"] = dict(values["stages"]["decoder"])
    assert list(by_name(values, tmp_path))[-3:] == ["decoder", "decoder_second", "model"]


def test_the_first_stage_collects_the_sources(tmp_path):
    command = by_name(own(), tmp_path)["documents"].make()
    assert command.arguments == (
        "prepare", f"--config={tmp_path / 'configs' / 'documents.py'}", "--source=folder:cats",
        "--licence=CC0-1.0", "--noreplace", f"--out={tmp_path / 'documents'}",
    )  # fmt: skip
    assert command.config["picture_side"] == 64


def test_the_index_may_hold_other_documents_than_the_training_data(tmp_path):
    sources = [{"kind": "folder", "path": "birds"}]
    index = {"share": 0.25, "prepare": {"sources": sources}}
    plan = by_name(own() | {"index": index}, tmp_path)
    assert list(plan) == [
        "documents", "index", "text", "tokenizer", "encoder", "thresholds", "encode",
        "encode_index", "decoder", "model",
    ]  # fmt: skip
    command = plan["index"].make()
    assert not any(argument.startswith("--source") for argument in command.arguments)
    assert command.arguments[-1] == f"--out={tmp_path / 'index'}"
    assert command.config == index["prepare"]
    assert f"--folder={tmp_path / 'index'}" in plan["encode_index"].make().arguments
    assert f"--index={tmp_path / 'index'}" in plan["model"].make().arguments
    files = stages.Layout(tmp_path)
    assert stages._mixture(index, files) == {
        "mixture": [
            {"folder": str(tmp_path / "documents"), "weight": 0.75},
            {"folder": str(tmp_path / "index"), "weight": 0.25},
        ]
    }
    with pytest.raises(UserError, match=r"config\.index has the keys share; it must have prepare"):
        by_name(own() | {"index": {"share": 0.25}}, tmp_path)
    with pytest.raises(UserError, match=r"config\.index\.share is 2; it must be 0 to 1"):
        by_name(own() | {"index": index | {"share": 2}}, tmp_path)


def test_thresholds_and_encode_take_flags_of_their_commands(tmp_path):
    values = own() | {"thresholds": {"alternate_sources": True}, "encode": {"variants": 3}}
    plan = by_name(values, tmp_path)
    assert "--alternate_sources=True" in plan["thresholds"].make().arguments
    assert "--variants=3" in plan["encode"].make().arguments


def test_selection_rules_of_the_configuration_replace_the_measured_ones(tmp_path):
    rules = {"near_copy_query": 0.9}
    stage = by_name(own() | {"selection": rules}, tmp_path)["thresholds"]
    command = stage.make()
    assert not command.arguments and json.loads(command.files[str(stage.output)]) == rules


def test_a_decoder_reads_all_variants_and_starts_at_the_codes(tmp_path, monkeypatch):
    document_folders.write(tmp_path / "documents", document_folders.drawings())
    monkeypatch.setattr(stages, "_codes", lambda path: 16)
    monkeypatch.setattr(stages.TextTokenizer, "load", lambda path: SimpleNamespace(size=300))
    values = own() | {"encode": {"variants": 3}}
    values["stages"]["decoder_second"] = dict(values["stages"]["decoder"])
    values["stages"]["decoder_third"] = {**values["stages"]["decoder"]}
    values["stages"]["decoder_third"]["data"] = {
        **values["stages"]["decoder"]["data"], "variants": 1,
    }  # fmt: skip
    plan = by_name(values, tmp_path)
    first, second, third = (
        plan[name].make().config for name in ("decoder", "decoder_second", "decoder_third")
    )
    assert first["data"]["variants"] == 3 and third["data"]["variants"] == 1
    assert first["codebook"] == str(tmp_path / "tokenizer/export/tokenizer.safetensors")
    # The second starts from the weights of the first.
    assert "codebook" not in second and second["loop"]["init_from"]


def test_a_batch_is_no_larger_than_the_data(tmp_path):
    document_folders.write(tmp_path / "documents", document_folders.drawings())
    plan = by_name(own(), tmp_path)
    encoder, tokenizer = plan["encoder"].make(), plan["tokenizer"].make()
    assert encoder.config["batch_size"] < 12 and encoder.config["batch_size"] % 2 == 0
    assert "batch_size is" in encoder.notes[0] and "instead of 128" in encoder.notes[0]
    assert tokenizer.config["batch_size"] == 4 and tokenizer.config["data"]["folder"]
    assert not plan["text"].make().notes


def test_too_few_documents_are_refused(tmp_path):
    document_folders.write(tmp_path / "documents", document_folders.drawings()[:5])
    with pytest.raises(UserError, match="has 5 documents to train on; at least 8 are needed"):
        by_name(own(), tmp_path)["tokenizer"].make()


def test_mistakes_in_the_configuration_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.stagess is unknown; the keys are encode"):
        by_name(own() | {"stagess": 1}, tmp_path)
    values = own()
    del values["stages"]["encoder"]
    with pytest.raises(UserError, match=r"config\.stages has no stage of the kind encoder"):
        by_name(values, tmp_path)
    with pytest.raises(UserError, match="--data is missing"):
        stages.stages(own(), Inputs((), (), tmp_path))


def stage(workdir, name, text="content", calls=None, **fields):
    """Returns a stage that writes a file and runs nothing."""
    output = workdir / name / "file"

    def make():
        output.parent.mkdir(parents=True, exist_ok=True)
        if calls is not None:
            calls.append(name)
        return Command((), files={str(output): text})

    return Stage(name, f"write {name}", make, output, 1.0, **fields)


def test_finished_stages_are_skipped_and_repeated_ones_are_not(tmp_path, capsys):
    def run():
        running.run([stage(tmp_path, "a", is_repeated=True), stage(tmp_path, "b")], tmp_path)
        return capsys.readouterr().out

    first = run()
    assert "stage 1 of 2: write a (about" in first and "stage 2 of 2: write b (about" in first
    (tmp_path / "b" / "file").write_text("changed")
    second = run()
    assert "stage 2 of 2: write b: finished before" in second
    assert (tmp_path / "b" / "file").read_text() == "changed"
    (tmp_path / "b" / "file").unlink()
    run()
    assert (tmp_path / "b" / "file").read_text() == "content"


def test_a_stage_with_other_settings_is_not_mixed_with_the_old_one(tmp_path):
    running.run([stage(tmp_path, "a"), stage(tmp_path, "b")], tmp_path)
    with pytest.raises(UserError, match="stage a was begun with other data or settings") as error:
        running.run([stage(tmp_path, "a", "other"), stage(tmp_path, "b")], tmp_path)
    assert f"remove {tmp_path / 'a'} {tmp_path / 'b'}" in str(error.value)
    # What comes after a changed stage is stale as well.
    (tmp_path / "a" / "file").unlink()
    record = json.loads((tmp_path / "pipeline.json").read_text())
    del record["a"]
    (tmp_path / "pipeline.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="stage b was begun with other data"):
        running.run([stage(tmp_path, "a", "other"), stage(tmp_path, "b")], tmp_path)


def test_a_failed_stage_is_named_and_runs_again(tmp_path):
    failing = Stage("a", "fail", lambda: Command(("no_such_verb",)), tmp_path / "none", 1.0)
    seconds = []
    for _ in range(2):
        with pytest.raises(UserError, match="stage a ended with exit code 2; its message is above"):
            running.run([failing], tmp_path)
        entry = json.loads((tmp_path / "pipeline.json").read_text())["a"]
        assert entry["finished"] is False
        seconds.append((entry["seconds"], entry["core_seconds"]))
    # The times of all attempts are added up.
    assert all(0 < first < second for first, second in zip(*seconds, strict=True))
    empty = Stage("a", "write nothing", lambda: Command(("--version",)), tmp_path / "none", 1.0)
    with pytest.raises(UserError, match="stage a was begun with other"):
        running.run([empty], tmp_path)


def test_a_second_pipeline_in_the_same_folder_is_refused(tmp_path):
    def nested():
        running.run([stage(tmp_path, "b")], tmp_path)
        return Command(())

    outer = Stage("a", "run a pipeline", nested, tmp_path / "none", 1.0)
    with pytest.raises(UserError, match="another pipeline runs in"):
        running.run([outer], tmp_path)


def test_a_config_file_of_a_stage_can_be_loaded(tmp_path):
    values = {"a": [1, 2], "b": {"c": None, "d": 'it\'s "quoted"'}}
    command = Command(("cache", f"--x={tmp_path}"), values)
    running._write_config(tmp_path / "x.py", command)
    assert runpy.run_path(str(tmp_path / "x.py"))["get_config"]().to_dict() == values
