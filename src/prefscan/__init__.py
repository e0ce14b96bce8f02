"""prefscan: which preference-tuning loss, at which β and how many steps, makes the better chat model?"""

import os

# Read by OpenMP when torch loads it, hence here. Spinning threads on a shared machine turned a 13 s training step
# into 209 s; passive waiting costs nothing measurable on an idle one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__version__ = "0.1.0"
