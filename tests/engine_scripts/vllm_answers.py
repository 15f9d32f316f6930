"""vLLM in fp32 answers prompts of tokens, alone and with an adapter: log-probabilities of the next token."""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest


def main():
    given = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(
        model=given["model"],
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
    settings = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in given["prompts"]]
    said = []
    for request in (None, LoRARequest("mixture", 1, given["adapter"])):
        answers = engine.generate(prompts, settings, lora_request=request, use_tqdm=False)
        found = [answer.outputs[0].logprobs[0] for answer in answers]
        said.append([[one[token].logprob for token in range(given["vocabulary"])] for one in found])
    Path(sys.argv[2]).write_text(json.dumps(said))


# vLLM starts a process of its own, which imports this file
if __name__ == "__main__":
    main()
