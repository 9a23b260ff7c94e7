"""An adapter straight from a JAX trainer: a pytree of arrays, no file. After each round of training the new weights
take the old name; requests that run meanwhile keep the old ones. It needs no download:

.venv/bin/python examples/trainer_arrays.py
"""

import jax
from jax import numpy as jnp

from slora_jax import Engine, EngineConfig, ModelConfig, Request, SamplingParams

MODEL = "random:tiny-gqa"  # random weights of a tiny Llama: any model does
RANK = 4


def init_lora(key: jax.Array, config: ModelConfig) -> dict:
    """LoRA on q and v of every layer, stacked over the layers: "a" is [layers, rank, inputs], "b" [layers, outputs,
    rank].
    """
    layers, width = config.num_layers, config.hidden_size
    sizes = {"q": config.q_size, "v": config.kv_size}
    return {
        module: {
            "a": jax.random.normal(jax.random.fold_in(key, i), (layers, RANK, width)) * width**-0.5,
            "b": jnp.zeros((layers, size, RANK)),  # as LoRA starts: no change to the base model
        }
        for i, (module, size) in enumerate(sizes.items())
    }


def train(weights: dict, key: jax.Array) -> dict:
    """Stands for your training loop: any step over the pytree, here a random one."""
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([x + jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def main() -> list[list[int]]:
    request = Request(prompt_token_ids=[1, 2, 3], adapter="trained", sampling=SamplingParams(max_tokens=8))
    answers = []
    with Engine.from_pretrained(MODEL, EngineConfig(max_lora_rank=RANK)) as engine:
        weights = init_lora(jax.random.key(0), engine.model.config)
        for round in range(3):
            digest = engine.add_adapter("trained", {"weights": weights, "lora_alpha": 2 * RANK})
            (output,) = engine.generate([request])
            print(f"after {round} rounds of training, adapter {digest[:12]} answers {output.token_ids}")
            answers.append(output.token_ids)
            weights = train(weights, jax.random.key(round + 1))
    return answers


if __name__ == "__main__":
    main()
