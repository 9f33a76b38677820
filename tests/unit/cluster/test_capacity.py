"""What fits into a cluster, what never can, and the lines that say so. Packings are compared with trying all of them."""

import itertools
import random
import re

import pytest

from keel.cluster.capacity import Ask, asks, bundles, free_words, one_of_each, packs, problems, words
from keel.config import loader
from keel.config.workers import GeneratorSettings, WorkerSettings
from keel.errors import ConfigError

CPUS = [{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 2.0}]


def tree(**blocks: dict[str, object]) -> dict[str, object]:
    rewards = [{"name": "low", "source": "rewards:low"}]
    return {"policy": {"model": "m"}, "prompts": {"source": "p"}, "rewards": rewards, **blocks}


def workers(cpus: int, gpus: float = 0.0, **resources: float) -> WorkerSettings:
    return WorkerSettings(threads=cpus, gpus=gpus, resources=resources)


def test_asks_are_those_of_the_configuration() -> None:
    settings = loader.parse(
        tree(generators={"threads": 3, "gpus": 1, "tensor_parallel": 2, "resources": {"fast": 0.5}}, reference=None)
    )
    result = {ask.role: (ask.count, ask.amounts) for ask in asks(settings, {"generator": 2, "scorer": 1, "learner": 4})}
    assert result == {
        "generator": (2, {"CPU": 3, "GPU": 2, "fast": 0.5}),
        "scorer": (1, {"CPU": 1}),
        "learner": (4, {"CPU": 2}),
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (workers(2), [{"CPU": 2}]),
        (workers(2, 0.5, fast=1), [{"CPU": 2, "GPU": 0.5, "fast": 1}]),
        (GeneratorSettings(threads=2, gpus=2), [{"CPU": 2, "GPU": 2}]),
        (
            GeneratorSettings(threads=2, gpus=1, tensor_parallel=3, resources={"fast": 1}),
            [{"CPU": 2, "fast": 1}, {"GPU": 1}, {"GPU": 1}, {"GPU": 1}],
        ),
    ],
)
def test_bundles_give_each_tensor_parallel_rank_a_gpu_of_its_own(
    config: WorkerSettings, expected: list[dict[str, float]]
) -> None:
    assert bundles(config) == expected


@pytest.mark.parametrize(
    ("ask", "nodes", "line"),
    [
        (
            Ask("generator", 1, workers(8)),
            CPUS,
            "generators.threads=8: one generator asks for 8 CPUs; the largest of 3 nodes has 4 (4, 4, 2)",
        ),
        (
            Ask("learner", 1, workers(8)),
            [{"CPU": 4.0, "memory": 2.0**40}],
            "learners.threads=8: one learner rank asks for 8 CPUs; the only node has 4",
        ),
        (
            Ask("scorer", 1, workers(1, 0.5)),
            [{"CPU": 4.0}],
            "scorers.gpus=0.5: one scorer asks for 0.5 GPUs; the only node has none",
        ),
        (
            Ask("reference", 1, workers(1, fast=2)),
            CPUS,
            "reference.resources.fast=2: one reference asks for 2 fast; none of 3 nodes has any",
        ),
        (
            Ask("generator", 1, GeneratorSettings(threads=1, gpus=1, tensor_parallel=4)),
            [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 2.0}],
            "generators.tensor_parallel=4: one generator asks for 4 GPUs; the largest of 2 nodes has 2 (2, 2)",
        ),
        (
            Ask("generator", 1, workers(4, 1)),
            [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}],
            "generators.threads=4: one generator asks for 4 CPUs and 1 GPU on one node; none of 2 nodes has that"
            " together (4 CPUs and 0 GPUs; 2 CPUs and 1 GPU)",
        ),
    ],
    ids=["cpus", "one node", "no gpu", "no custom", "tensor parallel", "not together"],
)
def test_one_worker_that_no_node_holds(ask: Ask, nodes: list[dict[str, float]], line: str) -> None:
    assert problems([ask], nodes) == [line]


def test_long_lists_of_nodes_are_cut() -> None:
    (line,) = problems([Ask("generator", 1, workers(8))], [{"CPU": 4.0}] * 100)
    assert line.endswith("the largest of 100 nodes has 4 (4, 4, 4, 4, 4, 4, 4, 4, ...)")


def roles(generators: int, learners: int) -> list[Ask]:
    return [
        Ask("generator", generators, workers(2)),
        Ask("reference", 1, workers(2)),
        Ask("scorer", 1, workers(1)),
        Ask("learner", learners, workers(4)),
    ]


def test_a_sum_that_the_cluster_does_not_have_shows_its_arithmetic() -> None:
    (line,) = problems(roles(4, 2), [{"CPU": 8.0}, {"CPU": 8.0}])
    assert line == (
        "generators.count=4: 4 x 2 CPUs (generators) + 1 x 2 (reference) + 1 x 1 (scorers) + 2 x 4 (learners) = 19 CPUs;"
        " the cluster has 16; expected at most 2 generators"
    )
    (line,) = problems(roles(8, 1), [{"CPU": 8.0}, {"CPU": 8.0}])
    assert line.startswith("generators.count=8: 8 x 2 CPUs") and line.endswith("has 16; expected at most 4 generators")
    assert problems(roles(4, 1), [{"CPU": 8.0}, {"CPU": 8.0}]) == []


def test_a_sum_says_so_where_fewer_workers_would_not_do() -> None:
    (line,) = problems(one_of_each(roles(4, 2)), [{"CPU": 4.0}, {"CPU": 4.0}])
    assert line == (
        "learners.threads=4: 1 x 2 CPUs (generators) + 1 x 2 (reference) + 1 x 1 (scorers) + 1 x 4 (learners) = 9 CPUs;"
        " the cluster has 8; expected a larger cluster, or less for each"
    )


def test_every_resource_that_is_short_has_a_line() -> None:
    both = [Ask("generator", 3, workers(2, 1)), Ask("learner", 1, workers(2, 1, fast=1))]
    lines = problems(both, [{"CPU": 4.0, "GPU": 2.0, "fast": 1.0}])
    assert lines == [
        "generators.count=3: 3 x 2 CPUs (generators) + 1 x 2 (learners) = 8 CPUs; the cluster has 4;"
        " expected at most 1 generators",
        "generators.count=3: 3 x 1 GPU (generators) + 1 x 1 (learners) = 4 GPUs; the cluster has 2;"
        " expected at most 1 generators",
    ]


def test_a_sum_that_fits_may_still_have_no_packing() -> None:
    """3 + 3 + 2 on each of two nodes; with a fifth 3 in place of two 2 nothing is left over but the wrong pieces."""
    nodes = [{"CPU": 8.0}, {"CPU": 8.0}]
    assert problems([Ask("generator", 4, workers(3)), Ask("scorer", 2, workers(2))], nodes) == []
    (line,) = problems([Ask("generator", 5, workers(3)), Ask("scorer", 1, workers(1))], nodes)
    assert line == (
        "generators.count=5: 5 x 3 CPUs (generators) + 1 x 1 CPU (scorers) cannot be divided among 2 nodes with 8, 8"
        " CPUs; expected at most 4 generators"
    )


def test_first_fit_decreasing_is_not_enough_to_refuse() -> None:
    """Where taking the largest first leaves one over, another order fits."""
    asked = [Ask(role, count, workers(cpus)) for role, count, cpus in
             (("generator", 2, 6), ("reference", 2, 4), ("scorer", 2, 5), ("learner", 2, 3))]  # fmt: skip
    assert sum(ask.count * ask.of("CPU") for ask in asked) == 36
    assert packs(asked, [{"CPU": 18.0}, {"CPU": 18.0}])
    assert packs([Ask("generator", 1, workers(4)), Ask("scorer", 2, workers(3)), Ask("learner", 3, workers(2))],
                 [{"CPU": 8.0}, {"CPU": 8.0}])  # fmt: skip


def fits_somehow(asked: list[Ask], nodes: list[dict[str, float]]) -> bool:
    """Every assignment of workers to nodes, one after the other."""
    item = [ask.amounts for ask in asked for _ in range(ask.count)]
    for places in itertools.product(range(len(nodes)), repeat=len(item)):
        used = [dict.fromkeys(("CPU", "GPU"), 0.0) for _ in nodes]
        for place, amounts in zip(places, item, strict=True):
            for name, amount in amounts.items():
                used[place][name] += amount
        if all(total[name] <= node.get(name, 0.0) for total, node in zip(used, nodes, strict=True) for name in total):
            return True
    return not item


@pytest.mark.parametrize("seed", range(8))
def test_packings_are_those_that_trying_all_finds(seed: int) -> None:
    draw, answers = random.Random(seed), []
    for _ in range(60):
        nodes = [
            {"CPU": float(draw.randint(1, 7)), "GPU": float(draw.randint(0, 2))} for _ in range(draw.randint(1, 3))
        ]
        asked = [
            Ask(role, draw.randint(1, 3), workers(draw.randint(1, 4), draw.choice([0, 0, 0.5, 1])))
            for role in ("generator", "scorer", "learner")[: draw.randint(1, 3)]
        ]
        answers.append(packs(asked, nodes))
        assert answers[-1] == fits_somehow(asked, nodes), (asked, nodes)
        assert bool(problems(asked, nodes)) != answers[-1]
    assert 10 < sum(answers) < 55  # both kinds occur


def test_a_large_cluster_is_never_refused_for_want_of_a_proof() -> None:
    asked = [Ask(role, 400, workers(cpus)) for role, cpus in (("generator", 7), ("scorer", 3), ("learner", 5))]
    assert problems(asked, [{"CPU": 15.0}] * 400) == []
    (line,) = problems(asked, [{"CPU": 15.0}] * 399)
    assert "= 6000 CPUs; the cluster has 5985; expected at most 397 generators" in line


def test_parts_of_resources_add_up_exactly() -> None:
    tenths = Ask("scorer", 10, workers(1, 0.1))
    assert problems([tenths], [{"CPU": 10.0, "GPU": 1.0}]) == []
    assert len(problems([Ask("scorer", 11, workers(1, 0.1))], [{"CPU": 11.0, "GPU": 1.0}])) == 1


def test_an_autoscaler_may_add_nodes_up_to_its_limits() -> None:
    asked = [Ask("generator", 4, workers(2, 1))]
    assert len(problems(asked, [{"CPU": 2.0}])) == 1
    assert problems(asked, [{"CPU": 2.0}], {"CPU": 8, "GPU": 4}) == []
    (line,) = problems(asked, [{"CPU": 2.0}], {"CPU": 8, "GPU": 3})
    assert line == (
        "generators.count=4: 4 x 1 GPU (generators) = 4 GPUs; the cluster may grow to 3; expected at most 3 generators"
    )
    assert (
        problems(asked, [{"CPU": 8.0, "GPU": 4.0}], {"CPU": 2}) == []
    )  # present nodes count, however they were started


def test_amounts_in_words() -> None:
    assert words({"CPU": 2.0, "GPU": 1.0, "fast": 0.5}) == "2 CPUs and 1 GPU and 0.5 fast"
    assert free_words([{"CPU": 0.0}, {"CPU": 1.0}], ["CPU"]) == "free are 1, 0 CPUs on 2 nodes"
    assert free_words([{}], ["CPU", "GPU"]) == "free are 0 CPUs and 0 GPUs on 1 node"


@pytest.mark.parametrize(
    ("block", "values", "line"),
    [
        (
            "generators",
            {"resources": {"CPU": 2}},
            "generators.resources.CPU=2: Ray's own; expected the setting threads",
        ),
        ("scorers", {"resources": {"GPU": 1}}, "scorers.resources.GPU=1: Ray's own; expected the setting gpus"),
        (
            "learners",
            {"resources": {"memory": 1}},
            "learners.resources.memory=1: Ray's own; expected a resource that nodes were started with",
        ),
        (
            "reference",
            {"resources": {"fast": 0}},
            "reference.resources.fast=0: expected a share above 0 and below 1, or a whole number",
        ),
        (
            "reference",
            {"resources": {"fast": 1.5}},
            "reference.resources.fast=1.5: expected a share above 0 and below 1, or a whole number",
        ),
        (
            "scorers",
            {"gpus": 1.5},
            "scorers.gpus=1.5: Ray shares no more than one; expected at most 1, or a whole number",
        ),
        (
            "generators",
            {"tensor_parallel": 2},
            "generators.tensor_parallel=2: gpus=0, and vLLM's Ray executor refuses CPUs; expected gpus=1",
        ),
        (
            "generators",
            {"tensor_parallel": 2, "gpus": 2},
            "generators.tensor_parallel=2: gpus=2, and vLLM gives each of its ranks one whole GPU; expected gpus=1",
        ),
    ],
)
def test_settings_that_ray_or_vllm_would_refuse(block: str, values: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)) as refused:
        loader.parse(tree(**{block: values}))
    assert str(refused.value) == line
