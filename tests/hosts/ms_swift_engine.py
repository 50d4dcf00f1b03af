"""What swift's engine answers with several adapters, as `swift deploy --adapters a=A b=B` uses it.

    python ms_swift_engine.py requests.json answers.json

`requests.json` holds the model's folder, the adapters' folders by name and, in order, the name that
each request goes to (None for the base) with its prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from swift.infer_engine import AdapterRequest, InferRequest, RequestConfig, TransformersEngine

if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    engine = TransformersEngine(
        given["model"], model_type="llama", template_type="dummy", torch_dtype=torch.float32
    )
    engine.template.use_chat_template = False
    greedy = RequestConfig(max_tokens=12, temperature=0)
    answers = []
    for name, prompt in given["requests"]:
        adapter = None if name is None else AdapterRequest(name, given["adapters"][name])
        request = InferRequest(messages=[{"role": "user", "content": prompt}])
        (answer,) = engine.infer([request], greedy, adapter_request=adapter)
        answers.append(answer.choices[0].message.content)
    Path(sys.argv[2]).write_text(json.dumps(answers))
