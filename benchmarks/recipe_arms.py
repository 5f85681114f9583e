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
    rounds = {"on_policy_rounds": steps // STEPS_A_ROUND, "on_policy_fraction": fraction}
    return rounds | {"on_policy_max_new_tokens": 128, "on_policy_batch_size": 96} | settings


def candidates() -> list[Arm]:
    """What the table's settings are chosen among."""
    found = []
    for temperature in (1.0, 2.5):
        for alpha in (0.5, 0.8, 1.0):
            for target, own in (("soft", {}), ("sampled", SAMPLED)):
                name = f"kd_T{temperature:g}_alpha{alpha:g}_{target}"
                settings = {"temperature": temperature, "alpha": alpha, **own}
                found.append(Arm(name, name, settings, CHOOSING_STEPS))
    for divergence in ("reverse_kl", "jsd"):
        sharp = SHARPENED if divergence == "reverse_kl" else SAMPLED
        for target, own in (("soft", {}), ("sampled", sharp)):
            settings = {"temperature": 1.0, "alpha": 0.8, "divergence": divergence, **own}
            found.append(Arm(f"{divergence}_{target}", f"{divergence}_{target}", settings, CHOOSING_STEPS))
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        sharp = SHARPENED if divergence == "reverse_kl" else SAMPLED
        for target, own in (("soft", {}), ("sampled", sharp)):
            name = f"on_policy_{divergence}_{target}"
            settings = {"temperature": 1.0, "alpha": 0.8, "divergence": divergence, **own}
            found.append(Arm(name, name, on_policy(0.5, CHOOSING_STEPS, **settings), CHOOSING_STEPS))
    return found


CANDIDATES = candidates()

ARMS = [
    Arm("sft", "SFT (alpha = 0)", {"alpha": 0.0}),
    Arm("kd_T2.5", "KD, T = 2.5, alpha = 0.8", {"temperature": 2.5, "alpha": 0.8}),
    Arm("kd_T1", "KD, T = 1, alpha = 0.8", {"temperature": 1.0, "alpha": 0.8}),
    Arm("kd_sampled", "KD, as sampled, alpha = 0.8", {"temperature": 1.0, "alpha": 0.8, **SAMPLED}),
    Arm("reverse_kl", "reverse KL", {"temperature": 1.0, "alpha": 0.8, "divergence": "reverse_kl"}),
    Arm("jsd", "JSD", {"temperature": 1.0, "alpha": 0.8, "divergence": "jsd"}),
    Arm("on_policy_half", "on-policy, f = 0.5", on_policy(0.5, temperature=1.0, alpha=0.8)),
    Arm("on_policy_all", "on-policy, f = 1", on_policy(1.0, temperature=1.0, alpha=0.8)),
    Arm("kd_begun", "half of the steps of KD", {"temperature": 1.0, "alpha": 0.8}, STEPS // 2),
    Arm(
        "on_policy_after",
        "KD, then on-policy, f = 1",
        on_policy(1.0, STEPS // 2, temperature=1.0, alpha=0.8),
        STEPS // 2,
        "kd_begun",
    ),
]
