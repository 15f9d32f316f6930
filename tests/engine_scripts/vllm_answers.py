"""vLLM in fp32 answers prompts of tokens, alone and with an adapter: log-probabilities of the next token.

Given is a list of {model, adapter, prompts, vocabulary, max_lora_rank}, said one pair of answers for each.
"""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest


def answers(given):
    engine = LLM(
        model=given["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        enable_lora=True,
        max_lora_rank=given["max_lora_rank"],
        max_loras=2,
        max_model_len=256,
        max_num_seqs=4,
        max_logprobs=-1,
        enforce_eager=True,
        seed=0,
    )
    settings = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in given["prompts"]]
    said = []
    for request in (None, LoRARequest("mixture", 1, given["adapter"])):
        answered = engine.generate(prompts, settings, lora_request=request, use_tqdm=False)
        found = [answer.outputs[0].logprobs[0] for answer in answered]
        said.append([[one[token].logprob for token in range(given["vocabulary"])] for one in found])
    return said


# vLLM may start a process of its own, which imports this file
if __name__ == "__main__":
    said = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        said.append(answers(job))
        gc.collect()
    Path(sys.argv[2]).write_text(json.dumps(said))
