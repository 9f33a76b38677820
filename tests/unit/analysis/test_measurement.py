"""Rates of `keel plan`: out of run directories and files, and the short run that measures them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel import files
from keel.analysis import measurement
from keel.analysis.plan import predict
from keel.analysis.rates import Rates
from keel.cluster.capacity import configured
from keel.config import loader
from keel.config.run import Settings
from keel.errors import ConfigError
from planned import APART, DRIVEN, GIVEN, rates, settings, written


def test_rates_come_back_from_the_files_of_a_run(tmp_path: Path) -> None:
    present = Rates.model_validate({**GIVEN, **DRIVEN})
    runs = [written(tmp_path / str(groups), settings(groups=groups), present) for groups in (4, 8)]
    result = measurement.measured(runs)
    for role in ("generator", "reference", "scorer", "learner"):
        subject, other = getattr(result, role), getattr(present, role)
        assert subject.fixed_seconds == pytest.approx(other.fixed_seconds, abs=0.02), role
        assert subject.sequence_seconds == pytest.approx(other.sequence_seconds, abs=0.005), role
    assert result.weights.publish_seconds == pytest.approx(0.125)
    assert result.weights.load_seconds == pytest.approx(0.25)
    assert result.driver.model_dump() == pytest.approx(present.driver.model_dump(), abs=1e-5)
    assert str(runs[0]) in result.source


def test_one_size_of_batch_leaves_the_fixed_part_to_an_assumption_and_evaluations_do_not(tmp_path: Path) -> None:
    result = measurement.measured([written(tmp_path / "run", settings(), rates())])
    assert result.generator.fixed_seconds == pytest.approx(1.0, abs=0.02), "a second size: two held-out prompts"
    assert result.generator.sequence_seconds == pytest.approx(0.25, abs=0.005)
    assert result.learner.fixed_seconds == pytest.approx(0.2 * (1 + 8 * 0.5))
    assert result.learner.seconds(8) == pytest.approx(1 + 8 * 0.5)


@pytest.mark.parametrize(("max_sequences", "waves"), [(64, 1), (4, 2), (2, 4)])
def test_a_run_predicts_its_own_step_time(tmp_path: Path, max_sequences: int, waves: int) -> None:
    """Eight sequences a batch and two held out: in waves of two both sizes only say what a wave takes."""
    sizes = settings(generators={"max_sequences": max_sequences})
    result = measurement.measured([written(tmp_path / "run", sizes, Rates.model_validate({**GIVEN, **DRIVEN}))])
    again = predict(sizes, result, configured(sizes), APART)
    assert again.step_seconds == pytest.approx(13.125 - 3 + (waves - 1) + 0.03 + 0.02 + 0.04, rel=0.01)
    if max_sequences != 2:
        assert result.generator.fixed_seconds == pytest.approx(1.0, abs=0.02)
    else:
        assert result.generator.fixed_seconds == pytest.approx(0.5 * (1.0 + 2 * 0.25), abs=0.02), "assumed"


def test_the_wait_for_a_busy_generator_is_no_time_of_a_load(tmp_path: Path) -> None:
    late = written(tmp_path / "late", settings(1), rates())
    assert measurement.measured([late]).weights.load_seconds == pytest.approx(0.25), "of the one quick step"
    busy = written(tmp_path / "busy", settings(1), rates(), quick_step=0)
    assert measurement.measured([busy]).weights.load_seconds == pytest.approx(2.75), "nothing better is known"
    synchronous = written(tmp_path / "synchronous", settings(), rates(weights={"load_seconds": 0.5}))
    assert measurement.measured([late, synchronous]).weights.load_seconds == pytest.approx(0.5)


def test_of_many_durations_some_of_every_part_of_the_runs_are_kept() -> None:
    """The machine gets four times slower half way: the first 200 would all be of the quick half."""
    durations = [0.4] * 300 + [1.6] * 300
    kept = measurement._thinned(durations)
    assert len(kept) == 200
    assert sorted(kept) == pytest.approx([0.4] * 100 + [1.6] * 100)
    assert measurement._thinned(durations[:200]) == durations[:200]
    odd = measurement._thinned([float(place % 7) for place in range(401)])
    assert len(odd) <= 200 and sum(odd) / len(odd) == pytest.approx(sum(place % 7 for place in range(401)) / 401)


def test_what_holds_no_rates_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--from .*: no config.yaml in it"):
        measurement.measured([tmp_path])
    short = written(tmp_path / "short", settings(steps=2), rates())
    with pytest.raises(ConfigError, match=r"--from .*: 2 steps, none without an evaluation"):
        measurement.measured([short])
    run = written(tmp_path / "run", settings(), rates())
    (run / "rollouts" / "step-000003.arrow").unlink()
    with pytest.raises(ConfigError, match=r"no step-000003.arrow in its rollouts/"):
        measurement.measured([run])


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        ({"learner": {"fixed_seconds": 0, "sequence_seconds": 0}}, "learner.*a step takes time"),
        ({"scorer": {"relative_seconds": [1.0, -0.5]}}, "scorer.relative_seconds"),
        ({"learner": {"cpu_ratio": 0.5}}, "learner.cpu_ratio"),
    ],
)
def test_rates_that_cannot_be_are_refused(tmp_path: Path, measured: dict[str, Any], why: str) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump({**GIVEN, **{role: {**GIVEN[role], **block} for role, block in measured.items()}}))
    with pytest.raises(ConfigError, match=why):
        loader.load_as(Rates, path)


def test_a_step_in_which_the_run_began_again_is_not_measured(tmp_path: Path) -> None:
    run = written(tmp_path / "run", settings(), rates())
    sound = measurement.measured([run])
    lines = files.read_json_lines(run / "metrics.jsonl")
    for line in lines[4:]:  # resumed after step 4: step 5 was made twice
        for name, values in line.items():
            if name.endswith("_seconds_total"):
                line[name] = {label: value + 30.0 for label, value in values.items()}
        line["phase_seconds_total"]["start"] = 100.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measurement.measured([run]).learner.seconds(8) == pytest.approx(sound.learner.seconds(8))


def test_a_calibration_measures_alone_and_evaluates_on_another_size(tmp_path: Path) -> None:
    from keel.analysis import calibration

    heard = {"tracking": {"trackers": ["wandb"]}, "metrics": {"discovery_directory": str(tmp_path)}}
    wanted = settings(2, groups=6, generators={"count": 3}, scorers={"count": 2}, prompts={"held_out": 64}, **heard)
    wide = settings(groups=6, generators={"max_sequences": 4}, prompts={"held_out": 64})
    result = calibration.settings_of(wanted, tmp_path)
    assert (result.generators.count, result.scorers.count, result.reference and result.reference.count) == (1, 1, 1)
    assert result.buffer.max_staleness == 0 and result.groups_per_batch == result.buffer.groups_per_step == 6
    assert result.prompts.held_out == 6, "half of the twelve sequences of a step"
    assert calibration.settings_of(wide, tmp_path).prompts.held_out == 2, "half of a wave"
    assert result.run_directory == str(tmp_path) and result.metrics.port == 0
    assert not result.tracking.trackers and not result.metrics.discovery_directory, "a calibration is no experiment"


ON_GPUS = {"gpus": 1, "count": 4, "zero_stage": 3}
ON_CORES = {"count": 2}


@pytest.mark.parametrize(
    ("address", "learners", "ranks"),
    [("local", ON_CORES, 1), ("local", ON_GPUS, 4), ("10.0.0.1:6379", ON_CORES, 2)],
)
def test_ranks_that_would_share_cores_are_measured_as_one(
    tmp_path: Path, address: str, learners: dict[str, Any], ranks: int
) -> None:
    from keel.analysis import calibration

    wanted = settings(learners=learners, cluster={"address": address})
    assert calibration.settings_of(wanted, tmp_path).learners.count == ranks


def test_a_calibration_in_a_cluster_writes_where_all_nodes_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keel.analysis import calibration

    seen = []

    def train(prepared: Settings, display: Any) -> None:
        seen.append(Path(prepared.run_directory))
        assert seen[-1].parent.is_dir()

    monkeypatch.setattr(calibration.preflight, "prepare", lambda settings: settings)
    monkeypatch.setattr(calibration.train, "run", train)
    monkeypatch.setattr(calibration.measurement, "measured", lambda directories: rates())
    run = {"directory": str(tmp_path / "shared" / "{name}")}
    for address in ("10.0.0.1:6379", "local"):
        calibration.run(settings(run=run, cluster={"address": address}), None)  # type: ignore[arg-type]
    assert seen[0].parent.parent == tmp_path / "shared" and not seen[0].parent.exists()
    assert tmp_path not in seen[1].parents
    assert not (tmp_path / "shared" / "test").exists(), "the run itself has not begun"
    (tmp_path / "file").write_text("")
    run = {"directory": str(tmp_path / "file" / "{name}")}
    with pytest.raises(ConfigError, match=r"run.directory=.*file is no folder that can be written to"):
        calibration.run(settings(run=run, cluster={"address": "10.0.0.1:6379"}), None)  # type: ignore[arg-type]
