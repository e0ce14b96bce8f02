"""prefscan: which preference-tuning loss, at which β and how many steps, makes the better chat model?"""

import gc
import os

# Read when torch loads OpenMP and first allocates, hence here. Threads that spin while they wait turned a 13 s training
# step into 209 s on a shared machine; a thousand turns cost others nothing and spare the wake-up between two kernels.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Huge pages: the page faults of fresh activations were a tenth to a fifth of a training step (docs/performance.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# bitsandbytes, which PEFT imports, has torch load its compiler, which no stage uses on a processor: two seconds of a
# stage's start. Where NVIDIA's driver, WSL's or AMD's has a device, FlexAttention and vLLM do compile.
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))):
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# On H100s and newer, SDPA's first choice is cuDNN, whose gradient is NaN for some padded lengths (trl issue 7181) and
# whose answers can be wrong (pytorch issue 193893). It also plans anew for every length: for each token of an answer.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
# TRL would report every training to the hub.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# torch, transformers and trl make so many objects when imported that Python's collector, which walks them again and
# again, took a third of a stage's start (docs/performance.md).
gc.set_threshold(100_000, 20, 20)

__version__ = "0.2.0"
