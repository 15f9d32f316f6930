"""mlx-lm reads models and adapters: log-probabilities of the token after each prompt.

Given is a list of {model, adapter or null, prompts}, said one list of answers for each.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
said = []
for job in json.loads(Path(sys.argv[1]).read_text()):
    model, _ = load_model(Path(job["model"]))
    if job["adapter"]:
        model = load_adapters(model, job["adapter"])
    model.eval()
    answers = []
    for prompt in job["prompts"]:
        logits = model(mx.array([prompt]))[0, -1].astype(mx.float32)
        answers.append((logits - mx.logsumexp(logits)).tolist())
    said.append(answers)
Path(sys.argv[2]).write_text(json.dumps(said))
