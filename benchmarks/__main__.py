"""``make bench ARGS="NAME ..."``: run one benchmark of this folder; the rest of ARGS is passed to it.

continual      every strategy on a miniature stream
cuda           on a GPU: Triton kernels, a step of the published 7B x 4, a larger demo; `--only PART`
data           speed-up from sequence packing and from cached encoder features
detection      latency of the MoE decoder beside the dense one, and of whole detectors at 640 pixels
engines        our server beside llama.cpp and vLLM, over HTTP
experts        the expert kernels beside the implementations a user could pick instead (the default)
few_bits       what experts of few bits cost, at the tokens of the demo's answers
fewer_experts  what pruned and merged experts cost, at the tokens of the demo's answers
handbook       prepare the Debian handbook in seven languages as text for `unimoe compare`
model          tokens per second of training and decoding, by expert implementation
packed_experts experts whose weights are packed (the same as `experts --op packed`)
same_losses    compare every loss with an earlier commit's
scale          throughput and memory by distributed strategy, on one and two processes
serve          continuous batching beside one request at a time, and a soak test
small_mixture  what the parts of `unimoe compress` do to a small mixture that is trained for it, three seeds
uni_moe_study  ablations: specialised experts, placement, top-k, load balance, modalities
video_order    temporal order: frames kept in time beside Uni-MoE's mean over frames
words          how much names tell about pictures: recognition of things whose names were never trained
zoo            registered experiments on the claims of published MoE designs
"""

import runpy
import sys
from pathlib import Path

sys.path.pop(0)  # this folder: a file in it must not hide a package of the same name
names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__main__")
name = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "experts"
if name not in names:
    sys.exit(f"unimoe: error: no benchmark {name!r}, expected one of {', '.join(names)}")
runpy.run_path(str(Path(__file__).with_name(f"{name}.py")), run_name="__main__")
