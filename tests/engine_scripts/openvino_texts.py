"""OpenVINO GenAI answers greedily with models that optimum exports: the texts of the base, and those with an adapter.

Given is a list of {model, adapter, prompts, tokens}, said [texts of the base, texts with the adapter] for each.
"""

import json
import sys
import tempfile
from pathlib import Path

import openvino_genai

# of the tests' environment, for another age of transformers than optimum takes: optimum does without it
sys.modules["diffusers"] = None

from optimum.exporters.openvino import main_export  # noqa: E402

said = []
for job in json.loads(Path(sys.argv[1]).read_text()):
    with tempfile.TemporaryDirectory() as folder:
        main_export(job["model"], folder, task="text-generation-with-past", convert_tokenizer=True, device="cpu")
        adapter = openvino_genai.Adapter(job["adapter"])
        asked = {"adapters": openvino_genai.AdapterConfig(adapter), "INFERENCE_PRECISION_HINT": "f32"}
        pipeline = openvino_genai.LLMPipeline(folder, "CPU", **asked)
        settings = {"max_new_tokens": job["tokens"], "do_sample": False, "apply_chat_template": False, "ignore_eos": True}
        both = (openvino_genai.AdapterConfig(), openvino_genai.AdapterConfig(adapter))
        said.append([[str(pipeline.generate(text, adapters=one, **settings)) for text in job["prompts"]] for one in both])
        del pipeline
Path(sys.argv[2]).write_text(json.dumps(said))
