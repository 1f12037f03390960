"""A compiled run for test_checkpoints.py: one compilation, which takes long, for all that is to be seen of it."""

import os
import shutil

import torch

import train


def main(words: list) -> int:
    """train.py with these words, compiled, on two threads: a whole run in ./whole, and in ./run the same from its
    checkpoint of step 3. Prints how many graphs were compiled before each step and after the last one."""
    torch.set_num_threads(2)
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    update = train.update

    def counted_update(run, step):
        graphs.append(counters["unique_graphs"])
        return update(run, step)

    train.update = counted_update
    assert train.main([*words, "--out_dir=whole", "--keep=9"]) == 0
    print("graphs", *graphs, counters["unique_graphs"])
    shutil.copytree("whole", "run")
    os.replace("run/last-3.pt", "run/last.pt")
    return train.main([*words, "--out_dir=run", "--init_from=resume"])
