"""The supervised fine-tuning stage (section 4.1): pretraining's loss on the tokens that the assistant writes.

The data's weights select these tokens: 1 in an answer, 0 elsewhere (`data/chat.py`).
"""

import dataclasses

from dsv2_jax import pretraining

STAGE = dataclasses.replace(pretraining.STAGE, name="fine-tuning")
