"""The base model and two adapters answer the same question in one batch. Run it after `make demo`, which fetches the
model:

.venv/bin/python examples/two_adapters.py
"""

import sys

from slora_jax import Engine, Request, SamplingParams

MODEL = "examples/models/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTERS = {"pirate": "examples/adapters/pirate", "haiku": "examples/adapters/haiku"}


def main(model: str = MODEL) -> None:
    question = [{"role": "user", "content": "Tell me about a lighthouse."}]
    with Engine.from_pretrained(model, adapters=ADAPTERS) as engine:
        sampling = SamplingParams(max_tokens=40)
        requests = [Request(messages=question, adapter=name, sampling=sampling) for name in (None, "pirate", "haiku")]
        for output in engine.generate(requests):
            print(f"{output.adapter or 'base model'}: {output.text}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
