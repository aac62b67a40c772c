/* Golden b with other sequential heads than its own: gated, RNN, none. set_joint() comes first. */
#ifndef HEADS_H
#define HEADS_H
#include "sessions.h"

#define HEADS static __attribute__((unused))

enum { H = 288, RANK = 40, GAMMA = 3, VOCAB = 301 };     /* of golden b */
#define B_CONFIDENCE "\"mtp.0.confidence_head.proj.weight\""
#define B_W1 "\"mtp.0.markov_head.markov_w1.weight\""

HEADS float joint[3 * RANK * (2 * RANK + H) + 3 * RANK];    /* the largest matrix of a head, and its bias */
HEADS void set_joint(void) {
    for (int i = 0; i < COUNT(joint); i++) joint[i] = (float)(dspark_uniform(9, 0, 0, 0, (uint32_t)i) - .5) * .4f;
}

HEADS const variant no_head = { golden_b, { { "\"dspark_markov_rank\": 40", "\"dspark_markov_rank\": 0" } },
                                 { { B_CONFIDENCE, "\"unused.0\"" }, { B_W1, "\"unused.1\"" },
                                   { "\"mtp.0.markov_head.markov_w2.weight\"", "\"unused.2\"" } }, NULL, 0 };
HEADS const variant gated = { golden_b, { { NULL, NULL } },
    { { B_W1, "\"mtp.0.markov_head.gate_proj.weight\":{\"dtype\":\"F32\",\"shape\":[40,328],\"data_offsets\":[6345295,6397775]},"
              "\"mtp.0.markov_head.gate_proj.bias\":{\"dtype\":\"F32\",\"shape\":[40],\"data_offsets\":[6397775,6397935]}," B_W1 } },
    joint, RANK * (RANK + H) + RANK };
HEADS const variant rnn = { golden_b, { { NULL, NULL } },
    { { B_W1, "\"mtp.0.markov_head.joint_proj.weight\":{\"dtype\":\"F32\",\"shape\":[120,368],\"data_offsets\":[6345295,6521935]},"
              "\"mtp.0.markov_head.joint_proj.bias\":{\"dtype\":\"F32\",\"shape\":[120],\"data_offsets\":[6521935,6522415]}," B_W1 } },
    joint, 3 * RANK * (2 * RANK + H) + 3 * RANK };
#endif
