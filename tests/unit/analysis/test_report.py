"""The numbers of a report against the files, read here by other means; what is refused; what is missing."""

import base64
import gc
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import report_runs
from keel import checkpoint, files
from keel.analysis import report, report_curves, report_page, report_rows
from keel.cluster import bundle
from keel.config import loader
from keel.config.stages import SupervisedSettings
from keel.errors import ConfigError
from keel.learner import tiny

T_15 = 2.131449545559323
"""Student's t at 97.5 % with 15 degrees of freedom, from a table."""
STEPS = [0, 5, 10, 15, 20]


class Blocks(HTMLParser):
    """Every tag, and the text of every script, as an HTML parser sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.lasttag == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data


def blocks(page: str) -> Blocks:
    parser = Blocks()
    parser.feed(page)
    parser.close()
    return parser


def numbers(*directories: Path) -> dict[str, Any]:
    """The JSON of the page, from its text."""
    page = report_page.html(report.collect(directories))
    (block,) = [text for attributes, text in blocks(page).scripts if attributes.get("id") == "numbers"]
    return json.loads(block)


def arrow(path: Path) -> list[dict[str, Any]]:
    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_file(source).read_all().to_pylist()


def evaluation(directory: Path, step: int) -> list[dict[str, Any]]:
    return arrow(directory / "evaluations" / f"step-{step:06d}.arrow")


def kl_of(row: dict[str, Any]) -> float:
    return math.fsum(row["completion_logprobs"]) - math.fsum(row["reference_logprobs"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_runs.online(tmp_path_factory.mktemp("report") / "known")


@pytest.fixture(scope="module")
def page(run: Path) -> dict[str, Any]:
    return numbers(run)


def test_training_curves_are_the_lines_of_metrics(run: Path, page: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = page["runs"][0]["training"]
    plain = {"reward", "kl_nats", "entropy_nats", "length_tokens", "loss", "policy_loss", "grad_norm", "step_seconds"}
    plain |= {"generate_tokens_per_second", "staleness_mean_versions", "staleness_max_versions"}
    for name in plain:
        assert training[name] == {
            "steps": list(range(1, 21)),
            "mean": [line[name] for line in lines],
            "low": [],
            "high": [],
        }
    for name in ("length", "gold"):
        assert training[f"reward_{name}"]["mean"] == [line["reward_component"][name] for line in lines]
    derived = {
        "tokens_per_second": 70.0,
        "idle_generator": 0.4,
        "idle_learner": 0.7,
    }  # 700 tokens in 10 s, 8 of 20, 7 of 10
    assert set(training) == plain | {"reward_length", "reward_gold"} | set(derived)
    for name, value in derived.items():
        assert training[name]["steps"] == list(range(2, 21))
        assert training[name]["mean"] == pytest.approx([value] * 19)


def test_evaluations_have_means_standard_errors_and_intervals(run: Path, page: dict[str, Any]) -> None:
    frontier = {row["step"]: row for row in arrow(run / "frontier.arrow")}
    points = page["runs"][0]["evaluations"]
    assert [point["step"] for point in points] == STEPS
    for point in points:
        rows = evaluation(run, point["step"])
        columns = {
            "reward": [row["reward"] for row in rows],
            "reward_gold": [row["reward_gold"] for row in rows],
            "kl_nats": [kl_of(row) for row in rows],
            "entropy_nats": [-statistics.fmean(row["completion_logprobs"]) for row in rows],
            "length_tokens": [len(row["completion_tokens"]) for row in rows],
        }
        for name, values in columns.items():
            stored, error = point["values"][name], statistics.stdev(values) / 4
            assert stored["mean"] == pytest.approx(statistics.fmean(values), abs=1e-5) and stored["n"] == 16
            assert stored["stderr"] == pytest.approx(error, rel=1e-4)
            assert stored["low"] == pytest.approx(stored["mean"] - T_15 * error, abs=1e-4)
            assert stored["high"] == pytest.approx(stored["mean"] + T_15 * error, abs=1e-4)
        assert point["values"]["reward"]["mean"] == pytest.approx(frontier[point["step"]]["proxy"])
        assert point["values"]["reward_gold"]["mean"] == pytest.approx(frontier[point["step"]]["gold"])
    curve = page["runs"][0]["evaluated"]["reward_gold"]
    assert curve["steps"] == STEPS and curve["high"] == [point["values"]["reward_gold"]["high"] for point in points]


def test_samples_of_a_prompt_count_once() -> None:
    assert report_curves.interval(np.array([1.0, np.nan, 3.0])).n == 2
    alone = report_curves.interval(np.array([1.5]))
    assert alone.mean == 1.5 and math.isnan(alone.stderr) and alone.n == 1
    assert report_curves.interval(np.array([])).n == 0


def test_rows_are_those_of_the_files(run: Path, page: dict[str, Any]) -> None:
    stored = {
        ("evaluation", step, row["completion"], row["prompt"]): row for step in STEPS for row in evaluation(run, step)
    }
    for step in range(1, 21):
        for row in arrow(run / "rollouts" / f"step-{step:06d}.arrow"):
            stored["training", step, row["completion"], row["prompt"]] = row
    rows = page["runs"][0]["rows"]
    assert len(rows["rows"]) == len(stored) == 5 * 16 + 20 * 8  # below the cap: all of them
    assert (rows["training_rows"], rows["evaluation_rows"], rows["steps_read"], rows["steps"]) == (160, 80, 20, 20)
    assert (rows["evaluations_read"], rows["evaluations"]) == (5, 5)
    for row in rows["rows"]:
        source = stored.pop((row["source"], row["step"], row["completion"], row["prompt"]))
        assert row["rewards"] == pytest.approx(
            {"reward": source["reward"], "reward_gold": source["reward_gold"]}, rel=1e-5
        )
        assert row["gap"] == pytest.approx(source["reward"] - source["reward_gold"], abs=1e-5)
        assert row["kl_nats"] == pytest.approx(kl_of(source), rel=1e-4, abs=1e-4)
        assert row["prompt_id"] == source["prompt_id"] and row["length_tokens"] == len(source["completion_tokens"])
        assert row["finish_reason"] == source["finish_reason"]
        ratios = np.array(source["completion_logprobs"]) - np.array(source["reference_logprobs"])
        assert row["log_ratios"] == pytest.approx(ratios.tolist(), abs=0.00501)
        assert row["pieces"] == [f"#{token} " for token in source["completion_tokens"]]  # there is no tokenizer
    assert not stored


def test_many_rows_are_capped_evenly_with_the_extremes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = report_runs.online(tmp_path / "long", steps=30, rows=16, every=10)
    monkeypatch.setattr(report_rows, "MOST_ROWS", 120)
    monkeypatch.setattr(report_rows, "MOST_FILES", 10)
    rows = report_rows.choose(run, 1)
    training = [row for row in rows.rows if row.source == "training"]
    assert len(rows.rows) <= 120 and (rows.steps_read, rows.steps, rows.training_rows) == (10, 30, 160)
    files_read = sorted({row.step for row in training})
    assert files_read[0] == 1 and files_read[-1] == 30
    read = [row for step in files_read for row in arrow(run / "rollouts" / f"step-{step:06d}.arrow")]
    assert len(read) == 160
    for key, value in (
        (lambda row: row["reward"], lambda row: row.rewards["reward"]),
        (lambda row: row["reward"] - row["reward_gold"], lambda row: row.gap),
        (kl_of, lambda row: row.kl_nats),
    ):
        values = sorted(map(key, read))
        embedded = sorted(value(row) for row in training)
        assert embedded[:5] == pytest.approx(values[:5], abs=1e-4) and embedded[-5:] == pytest.approx(
            values[-5:], abs=1e-4
        )
    held_out = [row for row in rows.rows if row.source == "evaluation"]
    prompts = {step: {row.prompt for row in held_out if row.step == step} for step in (0, 10, 20, 30)}
    assert len(prompts[0]) == 12 and all(of_step == prompts[0] for of_step in prompts.values())
    assert len(report_rows.choose(run, 2).rows) <= 60


def test_long_completions_make_the_rows_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = report_runs.online(tmp_path / "long", rows=16, tokens=12)
    monkeypatch.setattr(report_rows, "MOST_TOKENS", 1000)
    monkeypatch.setattr(report_rows, "_LONGEST_TOKENS", 4)
    rows = report_rows.choose(run, 1).rows
    assert 200 < len(rows) <= 250 and all(len(row.log_ratios) == len(row.pieces) == 4 for row in rows)


def test_tokens_have_the_text_of_the_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model")
    aside = checkpoint.begin(tmp_path / "run", 20)
    (aside / "policy").mkdir()
    (aside / "policy" / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    checkpoint.commit(aside, {"version": 20, "finished": False})
    for name in ("rollouts", "evaluations", "frontier.arrow", "config.yaml"):
        (tmp_path / "run" / name).symlink_to(run / name)
    rows = report_rows.choose(tmp_path / "run", 1)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert rows.token_texts
    for row, source in zip(rows.rows[:16], evaluation(run, 0), strict=True):
        whole = tokenizer.decode(source["completion_tokens"], skip_special_tokens=False)
        assert len(row.pieces) == len(source["completion_tokens"])
        assert whole.startswith("".join(row.pieces)) and set(whole[len("".join(row.pieces)) :]) <= {"\ufffd"}
    ids = tokenizer.encode("Zoë: 你好 ☕").ids
    assert "".join(report_rows._pieces(ids, tokenizer)) == "Zoë: 你好 ☕" and "" in report_rows._pieces(ids, tokenizer)


def of_bytes() -> Tokenizer:
    """A tokenizer like that of Llama 2: a byte that is in no piece is a token."""
    pieces = ["<unk>", "\u2581a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def test_tokens_without_a_text_are_shown_by_their_ids() -> None:
    """0xAF continues a character that the O before it does not begin: the text that was there before changes."""
    tokenizer = of_bytes()
    letter, stray, a, b = (tokenizer.token_to_id(token) for token in ("<0x4F>", "<0xAF>", "\u2581a", "b"))
    assert report_rows._pieces([letter, stray, a, b, a], tokenizer) == ["O", "", f"#{a} ", "b", " a"]
    assert report_rows._pieces([b, -1, b], tokenizer) == ["b", "#-1 ", "b"]


@pytest.mark.parametrize("content", ["no JSON", "{}"])
def test_a_tokenizer_that_cannot_be_read_is_none(content: str, tmp_path: Path) -> None:
    run = report_runs.online(tmp_path / "run", steps=2)
    aside = checkpoint.begin(run, 2)
    files.write(aside / "policy" / "tokenizer.json", content.encode())
    checkpoint.commit(aside, {"version": 2, "finished": False})
    rows = report_rows.choose(run, 1)
    assert not rows.token_texts and rows.rows[0].pieces[0].startswith("#")


def test_the_notes_count_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = report_runs.online(tmp_path / "run", steps=6, every=1)
    monkeypatch.setattr(report_rows, "_EVALUATIONS", 3)
    monkeypatch.setattr(report_rows, "MOST_FILES", 4)
    page = numbers(run)
    embedded = [row["source"] for row in page["runs"][0]["rows"]["rows"]]
    assert (embedded.count("training"), embedded.count("evaluation")) == (4 * 8, 3 * 16)
    assert page["notes"][-1] == (
        "run: 4 of 6 rollout files and 3 of 7 evaluations were read. Of their rows 32 of 32 training rows are in this"
        " page, the extremes of reward, proxy minus gold and KL among them, and 48 of 48 evaluation rows."
    )


def test_rows_without_a_reference_have_no_ratio(tmp_path: Path) -> None:
    run = report_runs.online(tmp_path / "run", steps=2, every=1)
    for path in [*(run / "rollouts").iterdir(), *(run / "evaluations").iterdir()]:
        with pa.OSFile(str(path)) as source:
            table = pa.ipc.open_file(source).read_all().drop_columns(["reference_logprobs"])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    rows = numbers(run)["runs"][0]["rows"]["rows"]
    assert rows and all(row["kl_nats"] is None and row["log_ratios"] == row["pieces"] == [] for row in rows)


def test_events_lie_at_their_step_or_behind_the_last_line_before_them(page: dict[str, Any]) -> None:
    events = [(event["name"], event["step"], event["kind"]) for event in page["runs"][0]["events"]]
    assert events == [("worker_lost", 6, "failure"), ("retry", 6, "failure"), ("guard", 13, "guard")]
    counts = {"worker_started": 1, "running": 1, "worker_lost": 1, "retry": 1, "guard": 1, "checkpoint": 1}
    assert page["runs"][0]["event_counts"] == counts


def test_what_the_guard_does_is_marked_as_its_own(tmp_path: Path) -> None:
    run = report_runs.online(tmp_path / "run", steps=6)
    for name, step in (("roll_back", 4), ("guard_multipliers", 5), ("guard_stop", 6), ("best", 5)):
        files.append_json(run / "events.jsonl", {"event": name, "time": 2000.0, "step": step})
    page = numbers(run)["runs"][0]
    kinds = {event["name"]: event["kind"] for event in page["events"]}
    assert kinds == {
        **dict.fromkeys(("worker_lost", "retry"), "failure"),
        **dict.fromkeys(("guard", "roll_back", "guard_multipliers", "guard_stop"), "guard"),
        "best": "other",
    }
    assert page["sentences"][-2:] == [
        "The guard warned: 1 x kl_slope.",
        "The guard acted: 1 x roll back to step 4, 1 x stop after step 6.",
    ]


def three_seeds(folder: Path) -> list[Path]:
    return [report_runs.online(folder / f"seed-{seed}", seed=seed, steps=8, every=4) for seed in (3, 4, 5)]


def test_runs_that_differ_by_their_seed_are_one_arm_with_a_band(tmp_path: Path) -> None:
    other = report_runs.online(tmp_path / "other", steps=8, every=4, seed=3, sampling={"temperature": 0.5})
    page = numbers(*three_seeds(tmp_path), other)
    assert [(arm["name"], arm["runs"]) for arm in page["arms"]] == [
        ("seed-3 and 2 more seeds", [0, 1, 2]),
        ("other", [3]),
    ]
    for curves in ("training", "evaluated"):
        for name, band in page["arms"][0][curves].items():
            values = list(zip(*(run[curves][name]["mean"] for run in page["runs"][:3]), strict=True))
            assert band["mean"] == pytest.approx([statistics.fmean(of_step) for of_step in values])
            assert band["low"] == [min(of_step) for of_step in values] and band["high"] == list(map(max, values))
        assert page["arms"][1][curves] == page["runs"][3][curves]
    differences = {row["setting"]: row["values"] for row in page["differences"]}
    assert differences == {"run.seed": ["3", "4", "5", "3"], "sampling.temperature": ["1.0", "1.0", "1.0", "0.5"]}
    assert [run["seed"] for run in page["runs"]] == [3, 4, 5, 3]


def test_a_repeated_run_of_a_seed_is_no_other_seed(tmp_path: Path) -> None:
    again = report_runs.online(tmp_path / "again", seed=4, steps=8, every=4)
    page = numbers(*three_seeds(tmp_path), again)
    assert [arm["runs"] for arm in page["arms"]] == [[0, 1, 2], [3]]


def test_the_directory_of_a_sweep_stands_for_its_runs(tmp_path: Path) -> None:
    for arm in ("kl", "none"):
        for seed in (0, 1):
            report_runs.online(tmp_path / "sweep" / arm / f"seed-{seed}", seed=seed)
            (tmp_path / "sweep" / "configs").mkdir(exist_ok=True)
            (tmp_path / "sweep" / "configs" / f"{arm}-seed-{seed}.yaml").touch()
    page = numbers(tmp_path / "sweep")
    assert [run["name"] for run in page["runs"]] == ["kl-seed-0", "kl-seed-1", "none-seed-0", "none-seed-1"]


def test_a_band_has_the_steps_that_all_seeds_have() -> None:
    curves = [report_curves.Curve([1, 2, 4], [1.0, 2.0, 4.0]), report_curves.Curve([2, 3, 4], [6.0, 3.0, 0.0])]
    assert report_curves.band(curves) == report_curves.Curve([2, 4], [4.0, 2.0], [2.0, 0.0], [6.0, 4.0])
    assert report_curves.band(curves[:1]) is curves[0]


def test_a_run_without_evaluations_and_one_without_steps(tmp_path: Path) -> None:
    run = report_runs.online(tmp_path / "run", steps=3)
    for path in (run / "evaluations").iterdir():
        path.unlink()
    (run / "frontier.arrow").unlink()
    page = numbers(run)["runs"][0]
    assert page["evaluations"] == [] and page["evaluated"] == {} and page["best_step"] is None
    assert len(page["rows"]["rows"]) == 24 and "no evaluation yet" in " ".join(page["sentences"])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"its last step, 3: reward {last['reward']:.3g}, KL 16 nats" in " ".join(page["sentences"])
    for name in ("metrics.jsonl", "events.jsonl"):
        (run / name).unlink()
    for path in (run / "rollouts").iterdir():
        path.unlink()
    page = numbers(run)["runs"][0]
    assert page["training"] == {} and page["rows"]["rows"] == [] and page["events"] == []
    assert "broken off at step 0 of 3" in page["sentences"][0]


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_counted(run: Path, tmp_path: Path) -> None:
    live = report_runs.online(tmp_path / "live", steps=3)
    with (live / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward": 0.')
    page = numbers(live)["runs"][0]
    assert page["training"]["reward"]["steps"] == [1, 2, 3] and "damaged" not in " ".join(page["sentences"])
    with files.lock(live):
        assert "live, at step 3 of 3" in numbers(live)["runs"][0]["sentences"][0]
    lines = (live / "metrics.jsonl").read_text().splitlines()
    (live / "metrics.jsonl").write_text("\n".join([lines[0], "no JSON", lines[2], ""]))
    page = numbers(live)["runs"][0]
    assert page["training"]["reward"]["steps"] == [1, 3] and "1 lines of metrics.jsonl are damaged" in " ".join(
        page["sentences"]
    )


def stage(directory: Path, seed: int = 0) -> Path:
    tree = {"run": {"name": "sft", "seed": seed}, "policy": {"model": "tiny"}, "prompts": {"source": "rows.jsonl"}}
    files.write(directory / "config.yaml", loader.dump(loader.parse_as(SupervisedSettings, tree)).encode())
    return directory


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    files.write(path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())


def test_a_stage_shows_its_held_out_loss(tmp_path: Path) -> None:
    directory = stage(tmp_path / "sft")
    write_lines(
        directory / "metrics.jsonl",
        [{"step": n, "time": 5.0 * n, "loss": 3.0 / n, "trained_tokens_total": 50.0 * n} for n in (1, 2, 3)],
    )
    write_lines(
        directory / "evaluations.jsonl", [{"step": 0, "loss": 4.0}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": 2.25}]
    )
    page = numbers(directory)["runs"][0]
    assert page["training"]["loss"]["mean"] == [3.0, 1.5, 1.0] and page["training"]["tokens_per_second"]["mean"] == [
        10.0,
        10.0,
    ]
    assert page["evaluated"] == {"held_out_loss": {"steps": [0, 2, 3], "mean": [4.0, 1.5, 2.25], "low": [], "high": []}}
    assert "from 4 at step 0 to 2.25 at step 3; the best was 1.5 at step 2." in page["sentences"][1]
    assert page["command"] == "sft" and page["rows"]["rows"] == []


def test_members_of_a_reward_stage_are_an_arm(tmp_path: Path) -> None:
    tree = {"run": {"name": "rm", "seed": 0}, "members": {"count": 2}}
    files.write(tmp_path / "rm" / "config.yaml", yaml.safe_dump(tree).encode())
    for member in (0, 1):
        write_lines(
            tmp_path / "rm" / "members" / str(member) / "metrics.jsonl",
            [{"step": 1, "time": 1.0, "loss": 1.0 + member}],
        )
    page = numbers(tmp_path / "rm")
    assert [run["name"] for run in page["runs"]] == ["rm member 0", "rm member 1"]
    assert page["arms"][0]["name"] == "rm member 0 and 1 more seed"
    assert page["arms"][0]["training"]["loss"] == {"steps": [1], "mean": [1.5], "low": [1.0], "high": [2.0]}


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^RUN_DIR=.*empty: no config.yaml in it; expected the directory of a run$"):
        report.collect([tmp_path / "empty"])
    files.write(tmp_path / "labels" / "config.yaml", yaml.safe_dump({"run": {"name": "a"}, "judge": {}}).encode())
    with pytest.raises(ConfigError, match="keel label trains nothing over steps"):
        report.collect([tmp_path / "labels"])
    run = report_runs.online(tmp_path / "run", steps=2)
    (run / "rollouts" / "step-000002.arrow").write_bytes(b"no arrow")
    with pytest.raises(ConfigError, match=r"^RUN_DIR=.*run: Arrow\w+: .*; expected the files of a run$"):
        report.collect([run])
    files.append_json(run / "events.jsonl", {"event": "retry", "time": 1e300})  # read before the rollouts
    with pytest.raises(ConfigError, match=r"^RUN_DIR=.*run: OverflowError: .*; expected the files of a run$"):
        report.collect([run])


def test_a_name_that_two_runs_have_becomes_the_directory(tmp_path: Path) -> None:
    runs = [report_runs.online(tmp_path / folder / "run", steps=2, seed=seed) for seed, folder in enumerate("ab")]
    assert [item["name"] for item in numbers(*runs)["runs"]] == [str(run) for run in runs]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = report_runs.online(tmp_path / "run", steps=4, every=2, hostile=True)
    text = report_page.html(report.collect([run]))
    parsed = blocks(text)
    assert (
        parsed.tags.count("script") == 4 and "img" not in parsed.tags and text.isascii() is False
    )  # the scripts' arrows
    (block,) = [script for attributes, script in parsed.scripts if attributes.get("id") == "numbers"]
    assert block.isascii() and not set("<>&") & set(block)
    page = json.loads(block)["runs"][0]
    assert page["rows"]["rows"][0]["completion"] == f"{report_runs.HOSTILE}0" and page["name"] == run.name
    lost = next(event for event in page["events"] if event["name"] == "worker_lost")
    assert "</script><script>alert(1)</script>" in lost["detail"]


def test_the_page_asks_for_nothing_and_runs_only_its_own_scripts(page: dict[str, Any], run: Path) -> None:
    text = report_page.html(report.collect([run]))
    assets = Path(report_page.__file__).parent / "report_assets"
    policy = text.partition('Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy and "http" not in policy
    for name in ("charts.js", "rollouts.js", "page.js", "report.css"):
        content = (assets / name).read_text(encoding="utf8")
        assert f">{content}</" in text and "</script" not in content and "<!--" not in content
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
        assert not any(
            word in content for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(")
        )


def test_numbers_that_are_not_finite_are_null() -> None:
    curve = report_curves.Curve([1, 2], [math.nan, 1.0], [-math.inf], [])
    arm = report.Arm("a", [0], {"loss": curve}, {})
    whole = json.loads(report_page.as_json(report.Report("1", "now", [], [], [arm], [], [])))
    assert whole["arms"][0]["training"]["loss"] == {"steps": [1, 2], "mean": [None, 1.0], "low": [None], "high": []}


def test_secrets_of_the_settings_are_not_shown(tmp_path: Path) -> None:
    run = report_runs.online(tmp_path / "run", steps=2)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["rewards"][0] |= {
        "headers": {"Authorization": "Bearer hunter2"},
        "source": "https://user:hunter2@host/score",
    }
    header = (run / "config.yaml").read_text().partition("\n")[0]
    (run / "config.yaml").write_text(f"{header}\n{yaml.safe_dump(tree)}")
    text = report_page.html(report.collect([run]))
    assert "hunter2" not in text and "https://...@host/score" in text and "(not shown)" in text


def test_the_environment_is_what_the_directory_says(run: Path, page: dict[str, Any]) -> None:
    assert page["runs"][0]["environment"] == {
        "configuration": (run / "config.yaml").read_text().partition("\n")[0].removeprefix("# "),
        "model": "tiny",
        "keel.schema_version": "2",
        "keel.run": "test",
        "keel.tokenizer": "words",
        "workers": "2 generator, 1 learner",
        "first record": "1970-01-01 00:15:00 UTC",
        "last record": "1970-01-01 00:20:01 UTC",
    }
    assert page["runs"][0]["settings"]["run.steps"] == "20"


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_files_are_closed(run: Path) -> None:
    collected = report.collect([run])
    gc.collect()  # which warns of files that were left open
    assert len(collected.runs) == 1


def test_charts_are_those_with_a_curve_gold_first(page: dict[str, Any]) -> None:
    names = [chart["name"] for chart in page["charts"]]
    assert names[:3] == ["reward", "reward_gold", "kl_nats"] and len(set(names)) == len(names)
    curves = page["runs"][0]["training"]
    assert curves["reward_length"] == curves["reward"]  # one chart of the two is enough
    assert set(names) == {*curves, *page["runs"][0]["evaluated"]} - {"reward_length"}
    assert [chart["title"] for chart in page["charts"][:2]] == ["Proxy: the training reward", "Reward: gold (monitor)"]


@given(st.integers(0, 5000), st.integers(1, 300))
def test_even_choices_have_both_ends_and_no_gap_much_larger_than_another(count: int, most: int) -> None:
    places = report_curves.evenly(count, most)
    assert len(places) == min(count, most) == len(set(places)) and places == sorted(places)
    if len(places) > 1:
        gaps = {later - earlier for earlier, later in itertools.pairwise(places)}
        assert places[0] == 0 and places[-1] == count - 1 and max(gaps) - min(gaps) <= 2


def test_a_job_takes_the_page_along() -> None:
    names = set(bundle.package().files)
    assets = {
        f"keel/analysis/report_assets/{name}"
        for name in ("report.html", "report.css", "charts.js", "rollouts.js", "page.js")
    }
    assert assets <= names
