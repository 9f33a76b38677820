"""What `keel verify` finds in damaged run directories, and what it leaves alone. Killed runs: test_verify_kills.py."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from keel import files, schema
from keel.analysis import verify
from keel.cli import main
from keel.rollout import segments
from runs import STEPS, Writer, read_rows, scored, settings

pytestmark = pytest.mark.usefixtures("restored_process")  # the command line has its process for itself

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps at staleness 1 with two failed groups and a lost one."""
    folder = tmp_path_factory.mktemp("verify") / "run"
    Writer(folder, settings(1), failing=frozenset({1, 6}), lost=frozenset({3})).train()
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def files_with_findings(run: Path) -> set[str]:
    return {finding.file for finding in verify.check(run).findings}


def test_an_intact_run_has_no_findings_and_is_counted(original: Path) -> None:
    report = verify.check(original)
    assert report.findings == () and report.notes == ()
    assert report.counts == {
        "steps": 5,
        "rows": 20,
        "largest_staleness_versions": 1,
        "tickets_trained": 10,
        "tickets_dropped": {"too_few_samples": 2, "worker_lost": 1},
        "groups_waiting": 2,  # made for a sixth step
        "segments": 2,
        "checkpoints": 2,
        "evaluations": 4,
        "events": {},
        "quarantined_files": 0,
    }


# ---- damage of every kind, and the file it is found in


def edit_lines(file: str, change: Callable[[list[dict[str, Any]]], Any]) -> Damage:
    def damage(run: Path) -> None:
        lines = files.read_json_lines(run / file)
        changed = change(lines)
        kept = changed if isinstance(changed, list) else lines
        (run / file).write_text("".join(json.dumps(line) + "\n" for line in kept))

    return damage


def manifest(change: Callable[[list[dict[str, Any]]], Any]) -> Damage:
    return edit_lines("rollouts/MANIFEST.jsonl", change)


def measured(change: Callable[[list[dict[str, Any]]], Any]) -> Damage:
    return edit_lines("metrics.jsonl", change)


def state(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Another state.json in the newest checkpoint, with a manifest that says so: the digests are right."""

    def damage(run: Path) -> None:
        folder = run / "checkpoints" / "step-000005"
        value = json.loads((folder / "state.json").read_text())
        change(value)
        files.write_json(folder / "state.json", value)
        listed = json.loads((folder / "MANIFEST.json").read_text())
        listed["files"]["state.json"] = files.digest(folder / "state.json")
        files.write_json(folder / "MANIFEST.json", listed)

    return damage


def rows(change: Callable[[pa.RecordBatch], pa.RecordBatch]) -> Damage:
    """Other rows in step 3, with a line and counters that fit them: only their meaning is wrong."""

    def damage(run: Path) -> None:
        path = run / "rollouts" / "step-000003.arrow"
        before = path.stat().st_size
        content = schema.to_bytes(change(read_rows(path)))
        path.write_bytes(content)

        def described(lines: list[dict[str, Any]]) -> None:
            lines[2] |= {"xxh3_128": files.digest_of(content), "rows": schema.from_bytes(content).num_rows}

        def counted(lines: list[dict[str, Any]]) -> None:
            for line in lines[2:]:
                line["rollout_bytes_total"] += content.size - before
                line["samples_accepted_total"] += schema.from_bytes(content).num_rows - 4

        manifest(described)(run)
        measured(counted)(run)

    return damage


def column(name: str, change: Callable[[list[Any]], list[Any]]) -> Damage:
    def changed(batch: pa.RecordBatch) -> pa.RecordBatch:
        place = batch.schema.get_field_index(name)
        field = batch.schema.field(place)
        return batch.set_column(place, field, pa.array(change(batch.column(name).to_pylist()), field.type))

    return rows(changed)


def delete(file: str) -> Damage:
    return lambda run: (run / file).unlink()


def truncate(file: str) -> Damage:
    return lambda run: (run / file).write_bytes((run / file).read_bytes()[:-20])


def write(file: str, content: bytes) -> Damage:
    return lambda run: (run / file).write_bytes(content)


def swap(lines: list[dict[str, Any]]) -> None:
    lines[1], lines[2] = lines[2], lines[1]


def train_again(lines: list[dict[str, Any]]) -> None:
    lines[3]["tickets"] = lines[2]["tickets"]


def counter(name: str, step: int, value: Any) -> Damage:
    return measured(lambda lines: lines[step - 1].update({name: value}))


def other_evaluation(run: Path) -> None:
    path = run / "evaluations" / "step-000002.arrow"
    batch = read_rows(path)
    place = batch.schema.get_field_index("reward")
    path.write_bytes(
        schema.to_bytes(batch.set_column(place, batch.schema.field(place), pa.array([9.0, 0.0, 0.0], pa.float32())))
    )


def frontier(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Damage:
    def damage(run: Path) -> None:
        batch = read_rows(run / "frontier.arrow")
        other = pa.RecordBatch.from_pylist(change(batch.to_pylist()), schema=batch.schema)
        (run / "frontier.arrow").write_bytes(schema.to_bytes(other))

    return damage


STEP_3, LEDGER, LAST = "rollouts/step-000003.arrow", "rollouts/MANIFEST.jsonl", "checkpoints/step-000005"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "rollouts deleted": (delete(STEP_3), STEP_3),
    "last rollouts deleted": (delete("rollouts/step-000005.arrow"), "rollouts/step-000005.arrow"),
    "rollouts truncated": (truncate(STEP_3), STEP_3),
    "rollouts without a line": (lambda run: shutil.copy(run / STEP_3, run / "rollouts/step-000009.arrow"), LEDGER),
    "manifest deleted": (delete(LEDGER), LEDGER),
    "line deleted": (manifest(lambda lines: lines[:2] + lines[3:]), LEDGER),
    "last line deleted": (manifest(lambda lines: lines[:-1]), LEDGER),
    "line twice": (manifest(lambda lines: [*lines[:2], lines[1], *lines[2:]]), LEDGER),
    "lines swapped": (manifest(swap), LEDGER),
    "line damaged": (manifest(lambda lines: lines[2].pop("tickets")), LEDGER),
    "other file": (manifest(lambda lines: lines[2].update(file="step-000002.arrow")), LEDGER),
    "ticket trained twice": (manifest(train_again), f"{LEDGER} step 4"),
    "ticket lost": (manifest(lambda lines: lines[0].update(dropped={})), f"{LEDGER} step 1"),
    "ticket dropped twice": (manifest(lambda lines: lines[1]["dropped"].update(again=[1])), f"{LEDGER} step 2"),
    "ticket dropped early": (manifest(lambda lines: lines[0]["dropped"].update(early=[9])), f"{LEDGER} step 1"),
    "dropped without reason": (manifest(lambda lines: lines[0].update(dropped={"": [1, 3]})), f"{LEDGER} step 1"),
    "another reason": (
        manifest(lambda lines: lines[0].update(dropped={"uniform_rewards": [1], "worker_lost": [3]})),
        "metrics.jsonl step 1",
    ),
    "tickets no numbers": (manifest(lambda lines: lines[2].update(tickets=["4", None])), f"{LEDGER} step 3"),
    "no tickets": (manifest(lambda lines: lines[2].update(tickets=[])), f"{LEDGER} step 3"),
    "last tickets no numbers": (manifest(lambda lines: lines[4].update(tickets=[8, None])), f"{LEDGER} step 5"),
    "dropped no list": (manifest(lambda lines: lines[2].update(dropped={"lost": 5})), f"{LEDGER} step 3"),
    "short step": (manifest(lambda lines: lines[4].update(tickets=lines[4]["tickets"][:1])), f"{LEDGER} step 5"),
    "fewer rows than said": (manifest(lambda lines: lines[2].update(rows=5)), STEP_3),
    "row twice": (rows(lambda batch: schema.concat([batch, batch.slice(3)])), STEP_3),
    "groups swapped": (rows(lambda batch: schema.concat([batch.slice(2, 2), batch.slice(0, 2)])), STEP_3),
    "group of one": (rows(lambda batch: schema.concat([batch.slice(1)])), STEP_3),
    "too late": (column("weight_versions", lambda old: [[0] * len(row) for row in old]), STEP_3),
    "from the future": (column("weight_versions", lambda old: [[*row[:-1], 3] for row in old]), STEP_3),
    "other seed": (column("seed", lambda old: [*old[:-1], 5]), STEP_3),
    "other sample": (column("sample", lambda old: [*old[:-1], 2]), STEP_3),
    "failed row": (column("reward", lambda old: [None, *old[1:]]), STEP_3),
    "bad log-prob": (column("completion_logprobs", lambda old: [[0.5] * len(row) for row in old]), STEP_3),
    "column missing": (rows(lambda batch: batch.drop_columns(["scorer"])), STEP_3),
    "metrics deleted": (delete("metrics.jsonl"), "metrics.jsonl"),
    "metrics line deleted": (measured(lambda lines: lines[:2] + lines[3:]), "metrics.jsonl"),
    "last metrics lines deleted": (measured(lambda lines: lines[:-2]), "metrics.jsonl"),
    "metrics line twice": (measured(lambda lines: [*lines, lines[-1]]), "metrics.jsonl"),
    "metrics lines swapped": (measured(swap), "metrics.jsonl"),
    "counter falls": (counter("completion_tokens_total", 4, 1.0), "metrics.jsonl step 4"),
    "counter missing": (measured(lambda lines: lines[2].pop("retries_total")), "metrics.jsonl step 3"),
    "counter is text": (counter("retries_total", 3, "many"), "metrics.jsonl step 3"),
    "samples miscounted": (counter("samples_accepted_total", 3, 13.0), "metrics.jsonl step 3"),
    "bytes miscounted": (counter("rollout_bytes_total", 5, 1e9), "metrics.jsonl step 5"),
    "drops miscounted": (
        counter("groups_dropped_total", 5, {"too_few_samples": 3.0, "worker_lost": 1.0}),
        "metrics.jsonl step 5",
    ),
    "lost worker not counted": (counter("groups_dropped_total", 5, {"too_few_samples": 2.0}), "metrics.jsonl step 5"),
    "other version": (counter("version", 2, 3.0), "metrics.jsonl step 2"),
    "checkpoint file deleted": (delete(f"{LAST}/learner/state"), LAST),
    "checkpoint file truncated": (truncate(f"{LAST}/policy/model.safetensors"), LAST),
    "checkpoint manifest deleted": (delete(f"{LAST}/MANIFEST.json"), LAST),
    "checkpoint manifest emptied": (write(f"{LAST}/MANIFEST.json", b""), LAST),
    "checkpoint of another version": (state(lambda it: it.update(version=4)), f"{LAST}/state.json"),
    "checkpoint of other settings": (state(lambda it: it.update(digest="0" * 64)), f"{LAST}/state.json"),
    "checkpoint skips a ticket": (state(lambda it: it["buffer"].update(next_ticket=14)), f"{LAST}/state.json"),
    "checkpoint took more": (state(lambda it: it["buffer"].update(taken=11)), f"{LAST}/state.json"),
    "checkpoint counts less": (state(lambda it: it["totals"].update(steps_total=4.0)), f"{LAST}/state.json"),
    "checkpoint without buffer": (state(lambda it: it.pop("buffer")), LAST),
    "checkpoint of a step that was not recorded": (
        lambda run: shutil.copytree(run / LAST, run / "checkpoints/step-000007") and None,
        "metrics.jsonl",
    ),
    "evaluation deleted": (delete("evaluations/step-000002.arrow"), "evaluations/step-000002.arrow"),
    "evaluation truncated": (truncate("evaluations/step-000002.arrow"), "evaluations/step-000002.arrow"),
    "evaluation of other rewards": (other_evaluation, "frontier.arrow"),
    "frontier truncated": (truncate("frontier.arrow"), "frontier.arrow"),
    "frontier deleted": (delete("frontier.arrow"), "frontier.arrow"),
    "frontier row missing": (frontier(lambda old: old[:1] + old[2:]), "frontier.arrow"),
    "frontier row twice": (frontier(lambda old: [*old, old[-1]]), "frontier.arrow"),
    "frontier swapped": (frontier(lambda old: old[::-1]), "frontier.arrow"),
    "frontier changed": (frontier(lambda old: [{**row, "kl_nats": 0.5} for row in old]), "frontier.arrow"),
    "setting changed": (lambda run: change_setting(run, "seed: 7", "seed: 8"), "config.yaml"),
    "setting broken": (lambda run: change_setting(run, "groups_per_step: 2", "groups_per_step: two"), "config.yaml"),
    "setting of another name": (lambda run: change_setting(run, "\nrewards:", "\nrewbrds:"), "config.yaml"),
    "digest line deleted": (lambda run: change_setting(run, "# written", "# wrote"), "config.yaml"),
}


def change_setting(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


@pytest.mark.parametrize("name", list(DAMAGES))
def test_damage_is_found_and_named(run: Path, name: str) -> None:
    damage, file = DAMAGES[name]
    damage(run)
    assert file in files_with_findings(run)


def test_a_damaged_segment_is_found(run: Path) -> None:
    for number, path in enumerate(segments.paths(run)):
        content = bytearray(path.read_bytes())
        content[100 + number] ^= 4
        path.write_bytes(content)
    assert files_with_findings(run) == {f"buffer/{path.name}" for path in segments.paths(run)}


DIGESTED = ("rollouts/step-*.arrow", "rollouts/MANIFEST.jsonl", "buffer/*", "checkpoints/*/*/*", "checkpoints/*/*.json")


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(kind=st.sampled_from(DIGESTED), data=st.data())
def test_any_flipped_bit_of_what_has_a_digest_is_found(original: Path, kind: str, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in original.glob(kind) if path.is_file())))
    content = path.read_bytes()
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    try:
        path.write_bytes(changed)
        assert verify.check(original).findings != ()
    finally:
        path.write_bytes(content)


# ---- what is in order


def test_leftovers_of_interrupted_writes_are_notes(run: Path) -> None:
    (run / "buffer" / ".segment.x.arrow.tmp").write_bytes(b"half")
    (run / "checkpoints" / ".step-000006.tmp" / "policy").mkdir(parents=True)
    (run / "checkpoints" / "step-000003").mkdir()
    with (run / "events.jsonl").open("w") as file:
        file.write('{"event": "resume", "time": 1}\n{"event": "worker_lost"}\n{"event": "resume"}\n{"eve')
    (run / "quarantine").mkdir()
    (run / "quarantine" / "batch.arrow").write_bytes(b"?")
    report = verify.check(run)
    assert report.findings == ()
    assert len(report.notes) == 4
    assert (report.counts["events"], report.counts["quarantined_files"]) == ({"resume": 2, "worker_lost": 1}, 1)


def test_a_step_nobody_has_trained_yet_may_have_rollouts(run: Path) -> None:
    """Killed in step 5 (of which nothing is known but its rollouts), with the checkpoint of step 4."""
    shutil.rmtree(run / LAST)
    measured(lambda lines: lines[:-1])(run)
    (run / "evaluations" / "step-000005.arrow").unlink()
    frontier(lambda old: old[:-1])(run)
    assert verify.check(run).findings == ()
    manifest(lambda lines: lines[:-1])(run)
    report = verify.check(run)
    assert report.findings == () and len(report.notes) == 1  # the file was written, the line was not
    measured(lambda lines: lines[:-1])(run)
    assert files_with_findings(run) == {"metrics.jsonl"}  # step 4 has a checkpoint, so it was recorded


# ---- the same run


def test_runs_of_the_same_settings_are_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Writer(tmp_path / name, settings(0, name=name), failing=frozenset({1})).train()
    one, two = tmp_path / "one", tmp_path / "two"
    assert verify.compare(one, two) == []
    lines = files.read_json_lines(two / "metrics.jsonl")
    assert lines[0]["time"] != files.read_json_lines(one / "metrics.jsonl")[0]["time"]
    lines[2] |= {"workers_lost_total": {"generator": 1.0}, "retries_total": 3.0, "wait_seconds": 7.0}
    (two / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert verify.compare(one, two) == []


DIFFERENCES: dict[str, tuple[Damage, str]] = {
    "metric": (measured(lambda lines: lines[1].update(version=9.0)), "metrics.jsonl step 2"),
    "metric missing": (measured(lambda lines: lines[1].pop("version")), "metrics.jsonl step 2"),
    "shorter": (measured(lambda lines: lines[:-1]), "metrics.jsonl"),
    "row": (column("completion", lambda old: [*old[:-1], "other words"]), STEP_3),
    "rows": (rows(lambda batch: schema.concat([batch.slice(1)])), STEP_3),
    "columns": (rows(lambda batch: batch.drop_columns(["reference_logprobs"])), STEP_3),
    "unreadable": (truncate(STEP_3), STEP_3),
    "file missing": (delete(STEP_3), "rollouts"),
    "weights": (write(f"{LAST}/policy/model.safetensors", b"x"), f"{LAST}/policy/model.safetensors"),
    "weights missing": (delete(f"{LAST}/policy/model.safetensors"), f"{LAST}/policy/model.safetensors"),
    "frontier": (frontier(lambda old: [{**row, "proxy": 1.0} for row in old]), "frontier.arrow"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "checkpoints"),
}


@pytest.mark.parametrize("name", list(DIFFERENCES))
def test_a_difference_is_found_and_named(original: Path, run: Path, name: str) -> None:
    damage, file = DIFFERENCES[name]
    damage(run)
    assert {finding.file for finding in verify.compare(run, original)} >= {file}


def test_who_made_a_row_and_how_long_it_took_is_no_difference(original: Path, run: Path) -> None:
    for name, value in {"generator": "another", "scorer": "another", "generate_seconds": 9.0}.items():
        column(name, lambda old, value=value: [value] * len(old))(run)
    result = verify.compare(run, original)
    assert {finding.file.partition(" ")[0] for finding in result} <= {"metrics.jsonl"}  # longer names, larger files


# ---- the command


def keel(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["keel", *map(str, arguments)])
    with pytest.raises(SystemExit, match=r"\A\d*\Z") as stop:
        main.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_command_shows_and_exits(
    original: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keel(monkeypatch, "verify", original, "--against", run) == 0
    page = capsys.readouterr().out
    assert "2 too_few_samples, 1 worker_lost" in page and "Intact" in page and f"Same     as {run}" in page
    (run / "rollouts" / "step-000002.arrow").unlink()
    assert keel(monkeypatch, "verify", run) == 1
    assert "Finding  rollouts/step-000002.arrow: expected the rows" in capsys.readouterr().out
    assert keel(monkeypatch, "verify", run, "--against", original, "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["intact"], result["counts"]["steps"], len(result["differences"])) == (False, STEPS, 1)
    assert result["findings"][0]["file"] == "rollouts/step-000002.arrow"
    assert keel(monkeypatch, "verify", original, "--against", run, "--json") == 1
    assert json.loads(capsys.readouterr().out)["intact"] is True


def test_a_long_list_is_cut_short_and_json_has_all(
    original: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(lambda lines: [{**line, **{f"own_{number}": 1.0 for number in range(6)}} for line in lines])(run)
    assert keel(monkeypatch, "verify", run, "--against", original) == 1
    page = capsys.readouterr().out
    assert page.count("Differs  ") == 21 and "Differs  ... and 10 more" in page
    assert keel(monkeypatch, "verify", run, "--against", original, "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["differences"]) == 30


def test_untrusted_text_is_shown_as_it_is(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "events.jsonl").write_text('{"event": "[bold]x[/nothing]"}\n')
    manifest(lambda lines: lines[0].update(dropped={"[red]why": [1, 3], "[/red]": [0]}))(run)
    assert keel(monkeypatch, "verify", run) == 1
    page = capsys.readouterr().out
    assert "[bold]x[/nothing]" in page and "[red]why" in page


def test_folders_of_no_online_run_are_refused(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "config.yaml").write_text("policy: {model: x}\nprompts: {source: y}\n")
    for folder, told in (
        (tmp_path, "no config.yaml"),
        (stage, "is of keel sft"),
        (tmp_path / "none", "no config.yaml"),
    ):
        assert keel(monkeypatch, "verify", folder) == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith(f"keel: RUN_DIR={folder}") and told in message and "\n" not in message
    assert keel(monkeypatch, "verify", original, "--against", stage) == 2


def test_verifying_imports_nothing_that_computes(original: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from keel.analysis import verify
verify.compare(Path({str(original)!r}), Path({str(original)!r}))
verify.check(Path({str(original)!r}))
print(sorted({{"torch", "ray", "vllm", "transformers", "deepspeed", "datasets"}} & set(sys.modules)))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (answer.stdout, answer.stderr) == ("[]\n", "")


def test_a_stored_segment_of_another_ticket_does_not_disturb(run: Path) -> None:
    """A resumed run makes a ticket again that was accepted for an earlier place: both files are there for a while."""
    batch = scored([11], version=4)
    segments.write(run, segments.Segment([11], batch, {11: {}}, {}))
    report = verify.check(run)
    assert report.findings == () and report.counts["segments"] == 3
