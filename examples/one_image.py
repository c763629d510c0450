"""One picture with the whole loop in sight: python examples/one_image.py [MODEL [FILE.png]]"""

import sys

import torch

from gen import Request, TextToImage
from gen.answer import as_output
from gen.conditioning import Conditions, Table
from gen.resolve import resolve
from samplers.guidance import combine
from samplers.noise import noise
from samplers.sample import advance, start
from samplers.scaling import denoiser
from samplers.state import Prediction

name, file = [*sys.argv[1:], *["shapes64", "one_image.png"][len(sys.argv) - 1 :]]
model = TextToImage.from_pretrained(name, device="cpu")
request = Request(prompt="a small red circle", seed=0, guidance_scale=3.0, sampler="euler", output_type="pt")
family, (candidate,) = model.model, resolve(request, model.model.abilities).candidates
with torch.no_grad():
    shape = family.latent_shape(candidate.settings)
    ((words, null),) = family.encode_prompts([candidate], Table())  # what the UNet is told: states of the text, ...
    (prompt,) = family.add_image_embeds([candidate], [words], family.prior.sample([candidate]))  # ... and a picture
    conditions, weights = Conditions((null, prompt)), torch.tensor([1 - 3.0, 3.0])
    estimate = denoiser(lambda x, timestep: family.call(x, timestep, conditions), family.levels.scaling)

    def denoise(x, sigma):  # one row, asked about under both conditions, weighed into one estimate
        both = estimate(x.expand(2, *shape), sigma.expand(2)).x0
        return Prediction(combine(both, weights, rows=torch.tensor([0, 0]), num_rows=1))

    schedule = family.levels.schedule("euler", candidate.settings.num_inference_steps)
    state = start("euler", noise([0], "decoder", 0, shape), torch.tensor([schedule.start_scale]))
    for step in range(schedule.num_steps):
        now, then = schedule.level(torch.tensor([step])), schedule.level(torch.tensor([step + 1]))
        state = advance("euler", denoise, state, now, then)
    picture = family.decode(state.x * schedule.end_scale)  # (1, 3, H, W) in [0, 1]

as_output(picture, "pil")[0].save(file)
assert torch.allclose(picture, model.paint([request])[0].images, atol=1 / 255), "the engine paints another"
