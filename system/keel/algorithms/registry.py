"""Objectives by kind: one literal table, and the user's own."""

from keel import user_code
from keel.algorithms.logits_convexity import LogitsConvexity
from keel.algorithms.objective import Build, Objective
from keel.algorithms.policy_gradient import PolicyGradient
from keel.algorithms.preferences import Preference
from keel.algorithms.weighted_likelihood import WeightedLikelihood
from keel.config.objective import CustomObjectiveSettings
from keel.config.run import LearnerSpec
from keel.errors import ConfigError
from keel.text import one_line

OBJECTIVES: dict[str, Build] = {
    "policy_gradient": PolicyGradient,
    "preference": Preference,
    "weighted_likelihood": WeightedLikelihood,
    "logits_convexity": LogitsConvexity,
}


def build(settings: LearnerSpec) -> Objective:
    """The configured objective. Raises ConfigError when code of the user's own cannot be imported or built."""
    config = settings.objective
    if not isinstance(config, CustomObjectiveSettings):
        return OBJECTIVES[config.kind](settings)
    user_class, named = user_code.import_symbol(config.source, "objective.source"), f"objective.source={config.source}"
    if not (isinstance(user_class, type) and issubclass(user_class, Objective)):
        raise ConfigError(f"{named}: not a class derived from keel.algorithms.objective.Objective; expected one")
    try:
        return user_class(settings)
    except ConfigError:
        raise
    except Exception as error:  # the user's code may raise anything; here it is bad input
        reason = f"{type(error).__name__} {one_line(error)}"
        raise ConfigError(f"{named}: raised {reason} when built; check objective.options") from None
