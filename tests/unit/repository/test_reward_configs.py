"""What configs/rewards names is there: prompts are read, rewards score them, and the server answers as the page says."""

import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest

from keel import user_code
from keel.config import loader
from keel.config.rewards import RewardSettings
from keel.config.workers import ScorerSettings
from keel.online import preflight
from keel.rollout import datasets, scorers
from rollouts import generated, prompts

FOLDER = Path(__file__).parents[3] / "configs" / "rewards"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_prompts_are_read_and_rewards_score_them(path: Path) -> None:
    settings = loader.load(path)
    rows = datasets.read_rows(settings.prompts)
    assert len({row.text for row in rows}) >= settings.prompts.held_out + 2 * settings.buffer.groups_per_step
    columns = [json.loads(row.further) for row in rows]
    for reward in settings.rewards:
        preflight.check_reward_source(reward, f"rewards.{reward.name}.source")
        if reward.kind != "rule":
            continue
        values = user_code.import_symbol(reward.source, "source")(
            prompts=[row.text for row in rows],
            completions=["The answer is 3."] * len(rows),
            completion_ids=[[1, 2, 3]] * len(rows),
            **{name: [row[name] for row in columns] for name in columns[0]},
        )
        assert len(values) == len(rows) and all(0 <= value <= 1 for value in values)


def test_the_page_names_what_there_is() -> None:
    page = (FOLDER.parent.parent / "docs" / "use" / "rewards.md").read_text(encoding="utf8")
    named = re.findall(r"keel\.\w+:\w+", page)
    assert len(named) >= 8 and all(user_code.import_symbol(source, "source") for source in named)
    configurations = set(re.findall(r"configs/rewards/([\w-]+)\.yaml", page))
    assert configurations == {path.stem for path in FILES} and page.isascii()


@pytest.fixture
def server() -> Iterator[tuple[str, ModuleType]]:
    """The address of configs/rewards/http_server.py on a free port, and its module."""
    specification = importlib.util.spec_from_file_location("http_server", FOLDER / "http_server.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.Rewards.log_message = lambda *arguments: None
    serving = ThreadingHTTPServer(("127.0.0.1", 0), module.Rewards)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}", module
    serving.shutdown()
    serving.server_close()


def test_the_server_answers_a_scorer(server: tuple[str, ModuleType]) -> None:
    """Twelve words earn 1, six 1/2, thirty 0; an answer without words is a failed sample."""
    address, _ = server
    reward = RewardSettings(name="brief", kind="http", source=address, retries=0)
    texts = ["word " * 12, "word " * 6, "word " * 30, ""]
    batch = generated(prompts([0, 1]))
    assert batch.num_rows == len(texts)
    batch = batch.set_column(
        batch.schema.get_field_index("completion"), batch.schema.field("completion"), pa.array(texts)
    )
    assert scorers._http(reward, ScorerSettings())(batch) == [1.0, 0.5, 0.0, None]


def test_a_server_that_breaks_fails_the_samples(server: tuple[str, ModuleType]) -> None:
    address, module = server
    reward = RewardSettings(name="brief", kind="http", source=address, retries=0)
    module.reward = lambda completion: "no number"
    assert scorers._http(reward, ScorerSettings())(generated(prompts([0]))) == "http_malformed"
    module.Rewards.do_POST = lambda handler: handler.send_error(503)
    assert scorers._http(reward, ScorerSettings())(generated(prompts([0]))) == "http_5xx"
