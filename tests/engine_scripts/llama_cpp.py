"""llama.cpp's server answers prompts of tokens with adapters at strengths: log-probabilities of the next token.

Given is a list of {model, adapters, vocabulary, requests: [[prompt, strengths], ..]}, said one list of answers for each.
"""

import json
import sys
from pathlib import Path

import xllamacpp


def serve(model, adapters):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch, parameters.n_parallel = 256, 256, 256, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup = parameters.fit_params = parameters.cache_prompt = False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
    return xllamacpp.Server(parameters)


def answer(server, prompt, strengths, vocabulary):
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 0.0, "cache_prompt": False}
    asked["lora"] = [{"id": number, "scale": scale} for number, scale in enumerate(strengths)]
    answered = server.handle_completions(asked)
    if "choices" not in answered:
        raise SystemExit(f"no answer but {str(answered)[:500]}")
    [token] = answered["choices"][0]["logprobs"]["content"]
    found = {each["id"]: each["logprob"] for each in token["top_logprobs"]}
    return [found.get(token) for token in range(vocabulary)]


said = []
for job in json.loads(Path(sys.argv[1]).read_text()):
    server = serve(job["model"], job["adapters"])
    said.append([answer(server, *request, job["vocabulary"]) for request in job["requests"]])
    del server
Path(sys.argv[2]).write_text(json.dumps(said))
