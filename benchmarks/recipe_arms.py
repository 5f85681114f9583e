"""The recipes that are compared: what each one sets beyond the profile benchmarks/recipes.yaml.

Settings are chosen on the validation rows with one seed and half the steps (`CANDIDATES`); the table is made of
`ARMS`, each with every seed, once, on the evaluation rows.
"""

from dataclasses import dataclass
from typing import Any

STEPS = 60  # of every arm of the table
CHOOSING_STEPS = 30  # of every candidate
STEPS_A_ROUND = 10  # the student answers anew after as many
SEEDS = (1, 2, 3)

# what the teacher's answers were sampled with (`generate_sft_data` of the profile)
SAMPLED = {"teacher_temperature": 0.2, "teacher_top_k": 20, "teacher_top_p": 0.9}
# its softmax alone at that temperature: what a divergence can have that is infinite where the filters leave nothing
SHARPENED = {"teacher_temperature": 0.2}


@dataclass(frozen=True)
class Arm:
    """One recipe.

    settings: of `KDConfig`, over those of the profile.
    steps: optimisation steps; those of an arm that it starts from count, so that all arms of the table have equally
        many in all.
    after: the arm whose adapter of the same seed it starts from.
    about: what a table says it is.
    """

    name: str
    about: str
    settings: dict[str, Any]
    steps: int = STEPS
    after: str = ""


def on_policy(fraction: float, steps: int = STEPS, **settings: Any) -> dict[str, Any]:
    # 60 steps, a round every 10: 6 rounds
    rounds = {"on_policy_rounds": steps // STEPS_A_ROUND, "on_policy_fraction": fraction}
    # 128: what the teacher had
    return rounds | {"on_policy_max_new_tokens": 128, "on_policy_batch_size": 96} | settings


SOFT: dict[str, Any] = {"temperature": 1.0, "alpha": 0.8}


def candidates() -> list[Arm]:
    """What the table's settings are chosen among."""
    found = [candidate("sft", alpha=0.0)]
    # the temperature and weight of KD, towards the softmax and towards what was sampled
    for temperature in (1.0, 2.5):
        for alpha in (0.5, 0.8, 1.0):
            for target, own in (("soft", {}), ("sampled", SAMPLED)):
                name = f"kd_T{temperature:g}_alpha{alpha:g}_{target}"
                found.append(candidate(name, temperature=temperature, alpha=alpha, **own))
    # the other divergences; reverse KL has no filters: it is infinite where they leave nothing
    for divergence, own in (("reverse_kl", SHARPENED), ("jsd", SAMPLED)):
        found.append(candidate(f"{divergence}_soft", **SOFT, divergence=divergence))
        found.append(candidate(f"{divergence}_sampled", **SOFT, divergence=divergence, **own))
    # half of each step on the student's own answers, with every divergence and target
    for divergence, own in (("forward_kl", SAMPLED), ("reverse_kl", SHARPENED), ("jsd", SAMPLED)):
        for target, targeted in (("soft", {}), ("sampled", own)):
            settings = on_policy(0.5, CHOOSING_STEPS, **SOFT, divergence=divergence, **targeted)
            found.append(candidate(f"on_policy_{divergence}_{target}", **settings))
    return found


def candidate(name: str, **settings: Any) -> Arm:
    """Its runs lie beside those of the table, hence a name of its own."""
    return Arm(f"candidate_{name}", name, settings, CHOOSING_STEPS)


CANDIDATES = candidates()

# The reference run's settings, those that the embedded profile had, and of each kind of recipe the best candidate. As
# sampled, alpha 0.5 did not differ from 0.8 or 1. On-policy rounds have the target and the divergence that were best
# for them, and go on from KD towards that target.
OFF_POLICY = SOFT | SAMPLED | {"alpha": 0.5}
ON_POLICY = SOFT | SAMPLED | {"divergence": "jsd"}
MINILLM = SOFT | {"divergence": "reverse_kl"}
# Of an arm that goes on from another: the teacher's rows in another order than before, for a run's own begins anew and
# would have the same rows a second time; and the divergence alone, as on the student's own answers, which have no
# cross-entropy.
GOING_ON = {"data_seed": 1000, "alpha": 1.0}
HALF = STEPS // 2

ARMS = [
    Arm("sft", "SFT (alpha = 0)", {"alpha": 0.0}),
    Arm("kd_T2.5", "KD, T = 2.5", {"temperature": 2.5, "alpha": 0.8}),
    Arm("kd_T1", "KD, T = 1", SOFT),
    Arm("kd_sampled", "KD, T = 1, as sampled", OFF_POLICY),
    Arm("kd_sampled_alpha0.8", "KD, T = 1, as sampled, alpha = 0.8", SOFT | SAMPLED),
    Arm("kd_T2.5_sampled", "KD, T = 2.5, as sampled", OFF_POLICY | {"temperature": 2.5}),
    Arm("reverse_kl", "reverse KL", SOFT | {"divergence": "reverse_kl"}),
    Arm("jsd", "JSD", SOFT | {"divergence": "jsd"}),
    Arm("on_policy_half", "on-policy, f = 0.5", on_policy(0.5, **ON_POLICY)),
    Arm("on_policy_all", "on-policy, f = 1", on_policy(1.0, **ON_POLICY)),
    Arm("kd_begun", "half of the steps of KD", OFF_POLICY, HALF),
    Arm("on_policy_after", "KD, then on-policy", on_policy(1.0, HALF, **ON_POLICY), HALF, "kd_begun"),
    Arm("on_policy_mixed", "KD, then half on-policy", on_policy(0.5, HALF, **ON_POLICY) | GOING_ON, HALF, "kd_begun"),
    # the control of both: the same divergence and target on the teacher's answers, a second warm-up and schedule
    Arm("kd_after", "KD, then JSD", ON_POLICY | GOING_ON, HALF, "kd_begun"),
    # the same towards the whole softmax, with the divergence that on-policy rounds are to lower (MiniLLM's)
    Arm("soft_begun", "half of the steps of KD, T = 1", SOFT, HALF),
    Arm("on_policy_soft", "KD, T = 1, then on-policy", on_policy(1.0, HALF, **MINILLM), HALF, "soft_begun"),
    Arm("soft_after", "KD, T = 1, then reverse KL", MINILLM | GOING_ON, HALF, "soft_begun"),
]


@dataclass(frozen=True)
class Pair:
    """Two arms that differ in one thing, or in few.

    differ: in what.
    """

    arm: str
    against: str
    differ: str


# What is asked of the table beside how each arm differs from SFT; everything that it tests stands here.
PAIRS = [
    Pair("kd_sampled_alpha0.8", "kd_T1", "target"),
    Pair("kd_sampled", "kd_sampled_alpha0.8", "alpha"),
    Pair("kd_T2.5", "kd_T1", "T"),
    Pair("reverse_kl", "kd_T1", "divergence"),
    Pair("jsd", "kd_T1", "divergence"),
    Pair("on_policy_half", "kd_sampled_alpha0.8", "whose text, divergence"),
    Pair("on_policy_all", "kd_sampled_alpha0.8", "whose text, divergence, no CE"),
    Pair("on_policy_after", "kd_after", "whose text"),
    Pair("on_policy_mixed", "kd_after", "whose text"),
    Pair("on_policy_soft", "soft_after", "whose text"),
    Pair("on_policy_after", "kd_sampled", "second half: whose text, divergence, no CE"),
    Pair("on_policy_mixed", "kd_sampled", "second half: whose text, divergence, no CE"),
    Pair("on_policy_soft", "kd_T1", "second half: whose text, divergence, no CE"),
]
