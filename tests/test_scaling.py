"""What Ray's autoscaler is asked for while the counts of a run change."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import settings_for
from keel import cluster
from keel.parts import Observer
from keel.scaling import Scaling


def test_the_autoscaler_holds_what_is_wanted_now_and_nothing_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Mapping[str, int]] = []
    monkeypatch.setattr(cluster, "request", lambda settings, counts: asked.append(dict(counts)))
    pool = SimpleNamespace(serving=1)
    gang: Any = SimpleNamespace(room=SimpleNamespace(ranks=1))
    link: Any = SimpleNamespace(desired={"generator": 1, "learner": 1}, stopping=False)
    pools: Any = {"generator": pool}
    scaling = Scaling(settings_for(), tmp_path, pools, link, Observer())
    scaling._record(gang)
    scaling.end()
    assert asked == [], "the nodes there are hold it"
    link.desired = {"generator": 4, "learner": 1}
    scaling._record(gang)
    scaling._record(gang)
    pool.serving = 2
    scaling._record(gang)
    assert asked == [{"generator": 4, "learner": 1}], "once, however long it lasts"
    link.desired, pool.serving = {"generator": 1, "learner": 1}, 1  # the spare ones do not serve from then on
    scaling._record(gang)
    assert asked[1:] == [{"generator": 1, "learner": 1}], "fewer now: the nodes of the others may go"
    scaling.end()
    assert asked[2:] == [{}]
