"""Every tolerance of the project, by dtype, with what was measured beside it."""

from __future__ import annotations

GAP_BAND = {"float32": 2e-4, "float16": 2e-4, "bfloat16": 2e-4}
"""τ: two implementations may decide a tile differently only where its gap lies this close to ln λ.

Scores are float32 sums of the same products whatever the model's dtype, so the band does not grow with the dtype of q
and k. It does grow with the size of the scores: one rounding of a score of 100 is 1e-5. Every check reports the largest
difference between the gaps of two implementations that it saw.
"""

OUTPUT = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest error of an attention output, relative to the largest |v| of the layer, on the same tiles.

An output is a weighted mean of V, so max|v| is its scale; two roundings of the dtype (float16 4.9e-4, bfloat16 3.9e-3)
and the weights' own error stay below these.
"""

LOGITS = {"float32": 1e-3, "float16": None, "bfloat16": None}
"""Largest end-to-end difference of a whole model's outputs; reported and not judged where None.

In float32 SmolLM2 measures 7e-5. In half precision one tile decided otherwise changes everything after it, so layers
are judged on their own q, k, v and the end-to-end difference is only told.
"""
