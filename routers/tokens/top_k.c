/* w = softmax over the `top_k` highest scores of each token, 0 for the others; of equal ones the first. A score that is not a
   number counts as the highest, as in torch.topk, and makes the token's weights none. `_scores.py` compiles this file. */

#include <math.h>
#include <stdint.h>

void top_k_softmax(const float *restrict scores, int64_t num_tokens, int64_t num_experts, int64_t top_k,
                   float *restrict w) {
    for (int64_t token = 0; token < num_tokens; token++, scores += num_experts, w += num_experts) {
        float high = 0, sum = 0;
        for (int64_t e = 0; e < num_experts; e++) w[e] = -1;
        for (int64_t k = 0; k < top_k; k++) {
            int64_t best = -1;
            for (int64_t e = 0; e < num_experts; e++)
                if (w[e] == -1 && (best < 0 || scores[e] > scores[best] || scores[e] != scores[e])) best = e;
            if (k == 0) high = scores[best];
            w[best] = expf(scores[best] - high);
            sum += w[best];
        }
        for (int64_t e = 0; e < num_experts; e++) w[e] = w[e] == -1 ? 0 : w[e] / sum;
    }
}
