// synth DIR [flash] [key=value ...]: writes a random checkpoint of any shape in the official format (synth.h).
// `synth /tmp/x flash num_hidden_layers=4 n_routed_experts=16`: DeepSeek-V4-Flash with four layers and 16 experts.
#define _GNU_SOURCE     // open_memstream
#include "synth.h"

int main(int argc, char **argv) {
    if (argc < 2) return fprintf(stderr, "synth DIR [flash] [key=value ...]\n"), 2;
    for (int i = 2; i < argc; i++) if (!synth_set(argv[i])) return 2;
    return synth_write(argv[1]);
}
