"""`keel deploy`: what is committed is what the code makes, it is in the wheel, and nothing of the user's is lost."""

import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder

from keel.cli import deploy_commands, main
from manifests import made

pytestmark = pytest.mark.usefixtures("restored_process")  # the command line has its process for itself

REPOSITORY = Path(__file__).parents[3]
COMMITTED = REPOSITORY / "deploy" / "grafana"


def deploy(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Exit code of `keel deploy`."""
    monkeypatch.setattr(sys, "argv", ["keel", "deploy", *arguments])
    with pytest.raises(SystemExit, match=r"\A\d*\Z") as stop:
        main.main()
    return stop.value.code


def test_committed_files_are_what_the_code_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert deploy(monkeypatch, "grafana", "--output", str(tmp_path)) == 0
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    present = {path.relative_to(COMMITTED): path.read_bytes() for path in COMMITTED.rglob("*") if path.is_file()}
    assert written == present


@pytest.mark.parametrize(("more", "code"), [((), 2), (("--force",), 0)])
def test_a_file_that_differs_is_overwritten_only_by_force(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    code: int,
) -> None:
    (tmp_path / "keel-compare.json").write_text("mine")
    assert deploy(monkeypatch, "grafana", "--output", str(tmp_path), *more) == code
    if code:
        assert [path.name for path in tmp_path.iterdir()] == ["keel-compare.json"]  # none of the others either
        expected = "keel-compare.json in it differs; expected --force, or another folder"
        assert capsys.readouterr().err == f"keel: --output={tmp_path}: {expected}\n"
    assert ((tmp_path / "keel-compare.json").read_text() == "mine") == bool(code)


def test_prometheus_looks_for_runs_where_they_say_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    deploy_commands.prometheus(output=tmp_path / "out", discovery=Path("seen: here"))
    tree = yaml.safe_load((tmp_path / "out" / "prometheus.yml").read_text())
    (keel,) = [job for job in tree["scrape_configs"] if job["job_name"] == "keel"]
    assert keel["file_sd_configs"][0]["files"] == [f"{tmp_path}/seen: here/keel-*.json"]
    deploy_commands.prometheus(output=tmp_path / "plain")
    assert "files: [discovery/keel-*.json]" in (tmp_path / "plain" / "prometheus.yml").read_text()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(deploy_commands.ConfigError, match="is a file; expected a folder"):
        deploy_commands.write(tmp_path / "taken", {"a": "b"}, force=True)


def test_files_come_from_inside_the_package_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert deploy_commands.deploy_folder() == REPOSITORY / "deploy"
    (tmp_path / "deploy" / "prometheus" / "rules").mkdir(parents=True)
    (tmp_path / "deploy" / "prometheus" / "rules" / "keel.yml").write_text("groups: []\n")
    monkeypatch.setattr(deploy_commands, "files", lambda package: tmp_path)
    assert deploy_commands.shipped("prometheus") == {"rules/keel.yml": "groups: []\n"}


def test_the_wheel_has_the_files(tmp_path: Path) -> None:
    """All of `deploy` inside the package; in an editable installation none, where they would grow old."""
    result = {}
    for version in ("standard", "editable"):
        for path in WheelBuilder(str(REPOSITORY)).build(directory=str(tmp_path), versions=[version]):
            with zipfile.ZipFile(path) as wheel:
                result[version] = {name: wheel.read(name) for name in wheel.namelist()}
    present = [path for path in (REPOSITORY / "deploy").rglob("*") if path.is_file()]
    expected = {f"keel/{path.relative_to(REPOSITORY)}": path.read_bytes() for path in present}
    assert {name: text for name, text in result["standard"].items() if name.startswith("keel/deploy/")} == expected
    assert [name for name in result["editable"] if name.startswith("keel/")] == []


def test_provisioning_names_the_folder_and_the_source_by_type() -> None:
    sources = yaml.safe_load((COMMITTED / "provisioning/datasources/keel.yaml").read_text())
    (source,) = sources["datasources"]
    assert source["type"] == "prometheus"
    providers = yaml.safe_load((COMMITTED / "provisioning/dashboards/keel.yaml").read_text())
    assert [provider["type"] for provider in providers["providers"]] == ["file"]


def test_grafana_knows_how_often_prometheus_scrapes() -> None:
    """Its windows of rates are four scrapes: with too small a number, curves have holes."""
    scraping = REPOSITORY / "deploy" / "prometheus" / "prometheus.yml"
    if not scraping.exists():
        pytest.skip("no deploy/prometheus/prometheus.yml")
    (source,) = yaml.safe_load((COMMITTED / "provisioning/datasources/keel.yaml").read_text())["datasources"]
    interval = source["jsonData"]["timeInterval"]
    assert interval == yaml.safe_load(scraping.read_text())["global"]["scrape_interval"]
    endpoints = made()["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert [endpoint["interval"] for endpoint in endpoints if endpoint["port"] == "keel-metrics"] == [interval]


def test_without_output_it_says_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert deploy(monkeypatch, "grafana") == 0
    lines = capsys.readouterr().out.splitlines()
    names = {str(path.relative_to(COMMITTED)) for path in COMMITTED.rglob("*") if path.is_file()}
    assert {line.split("  ")[0] for line in lines} == names
    assert deploy(monkeypatch, "prometheus") == 0
    printed = capsys.readouterr().out
    files = [path for path in (REPOSITORY / "deploy" / "prometheus").rglob("*") if path.is_file()]
    assert all(path.read_text() in printed for path in files)
    assert list(tmp_path.iterdir()) == []


def test_the_group_alone_shows_its_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy(monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.err == "" and all(f" {name} " in captured.out for name in ("grafana", "prometheus"))
