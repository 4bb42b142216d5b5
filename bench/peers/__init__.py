"""A race of training steps and short training runs against the other trainers of SAEs.

Each contender trains with its library's own loop, on the same batches in the same order, in a
process of its own, so that at most one model is in memory. Steps are timed in rounds, in which all
take turns. The training runs show what those steps are worth: held-out FVU after as many tokens.

All of it runs in one environment:

    pip install -c constraints.txt -e '.[demo,peers]' && pip uninstall torchvision

Without the second command, beside a CPU build of torch, a torchvision that one of them pulls in
keeps transformers from being imported.
"""
