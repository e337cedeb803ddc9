"""Number of positions of a model, and linear RoPE scaling beyond it (`--max-positions`).

A model trained on P positions reads N > P of them when position p is rotated as p * P / N was (position interpolation):
every angle stays within what training has seen. It changes keys and values, so recording, fitting, evaluation and
deployment must all be told the same N; the scaling is part of the model's fingerprint, which they compare.
"""

from transformers import PreTrainedConfig

from gradients.cli import UserError


def usable_positions(config: PreTrainedConfig) -> int:
    """Positions of a text decoder: those its config names, or those its YaRN scaling makes of the original ones.

    Qwen's model cards have YaRN added to a config whose `max_position_embeddings` stays as it is.
    """
    held = config.max_position_embeddings
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    if any(kind.get("rope_type") != "yarn" or not kind.get("factor") for kind in kinds):
        return held
    return max(held, *(int(kind["factor"] * kind["original_max_position_embeddings"]) for kind in kinds))


def extend_positions(config: PreTrainedConfig, positions: int) -> None:
    """Set linear RoPE scaling to `positions` positions in the text decoder's config, before the model is built.

    Raises `UserError` unless `positions` exceeds the model's, and for models with a RoPE scaling of their own.
    """
    held, parameters = config.max_position_embeddings, dict(config.rope_parameters)
    if positions <= held:
        raise UserError(
            f"--max-positions {positions} does not exceed the {held} positions of the model; leave it out or raise it"
        )
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)]
    if kinds or parameters.get("rope_type", "default") != "default":
        names = sorted({kind.get("rope_type", "default") for kind in kinds or [parameters]})
        own = "a rotary embedding for each type of layer" if kinds else "RoPE scaling of its own"
        raise UserError(
            f"--max-positions {positions}: the model has {own} ({', '.join(names)}) for its {held} positions; leave it out"
        )
    config.rope_parameters = {**parameters, "rope_type": "linear", "factor": positions / held}
    config.max_position_embeddings = positions
