"""The paper's model, one file for each box of its Fig. 2, in torch and einops alone.

| box of Fig. 2 | file |
|---|---|
| image or video clip -> patches; VA-VAE latents -> targets | `tokens.py` |
| mask | `masks.py` |
| context encoder (frame-causal ViT) | `encoder.py`, with `attention.py` |
| reference encoder (moving average) | `reference.py` |
| context-isolated autoregressive predictor | `predictor.py` |
| noise, flow path and flow loss | `flow.py` |
| flow-matching decoder (DiT inside each frame) | `decoder.py`, with those of Tab. 4 and 5 |
| the whole, with both losses | `nextvid.py` |

Beside them: `incremental.py` (generation with cached keys and values) and `cost.py` (`nextvid inspect RECIPE`).
"""
