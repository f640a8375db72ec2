# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # AdaSpa on a video pipeline: one line on, one line off
#
# AdaSpa looks at the attention of *this* video once or twice while it is being made, and from then on computes only the
# blocks that matter. The model here is tiny, so do not look for speed; look for what the method does and what it costs
# in quality. The same lines work on CogVideoX, HunyuanVideo, Wan, Mochi, LTX, FLUX, SD3 and Qwen-Image.
#
# In Colab, run `!pip install patchkit[video,viz]` first.

# %%
import torch

import patchkit
from patchkit import metrics, zoo
from patchkit.zoo import detect

pipe = zoo.load("video")
pipe.set_progress_bar_config(disable=True)
prompt = "a red circle moving right on a blue background"


def generate(steps=20, seed=0):
    """One clip, (17, 3, 64, 64) in [0, 1]."""
    inputs = dict(zoo.defaults("video")) | {"prompt": prompt, "num_inference_steps": steps}
    return pipe(generator=torch.Generator().manual_seed(seed), output_type="pt", **inputs).frames[0].float()


# %% [markdown]
# ## What would it do?
# `plan` changes nothing.

# %%
options = {"density": 0.25, "block_size": 32, "min_tokens": 0}
print(patchkit.plan(pipe, "adaspa", steps=20, **options))

# %% [markdown]
# ## Dense, then sparse, from the same seed

# %%
dense = generate()
patch = patchkit.apply(pipe, "adaspa", **options)
sparse = generate()
print(patch.report())

# %%
print(f"PSNR to the dense clip {metrics.psnr(sparse, dense):.1f} dB, SSIM {metrics.ssim(sparse, dense):.3f}")
print("dense: ", detect.score(dense, prompt))
print("sparse:", detect.score(sparse, prompt))

# %% [markdown]
# ## Off again: exactly the clip from before

# %%
patch.remove()
assert torch.equal(generate(), dense)

# %% [markdown]
# ## How much can go?

# %%
found = {}
for density in (0.1, 0.2, 0.3, 0.5, 1.0):
    with patchkit.apply(pipe, "adaspa", density=density, block_size=32, min_tokens=0) as patch:
        clip = generate()
        recall = patch.report()["recipes"][0]["means"].get("recall", 1.0)
    found[density] = (float(metrics.psnr(clip, dense)), recall, clip)
    print(f"density {density:.1f}: recall {recall:.3f}, PSNR {found[density][0]:.1f} dB")

# %%
try:
    import matplotlib.pyplot as plt
except ImportError:
    plt = None
if plt is not None:
    figure, axes = plt.subplots(len(found) + 1, 6, figsize=(9, 9))
    clips = {"dense": dense} | {f"density {d}": clip for d, (_, _, clip) in found.items()}
    for row, (name, clip) in zip(axes, clips.items(), strict=True):
        for ax, i in zip(row, range(0, 17, 3), strict=True):
            ax.imshow(clip[i].permute(1, 2, 0).clamp(0, 1))
            ax.axis("off")
        row[0].set_title(name, loc="left")
    plt.show()
