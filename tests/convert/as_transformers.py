"""Run by tests in the reference environment: python as_transformers.py INPUTS OUTPUTS FOLDER ...

INPUTS: safetensors with input_ids and pixel_values, and as metadata texts to encode, a conversation, a picture. OUTPUTS
gets for each -hf FOLDER, by its name, what transformers computes, and as metadata what else it says.
"""
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

inputs, outputs, *folders = map(Path, sys.argv[1:])
tensors, said = {}, {}
for folder in folders:
    model, loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    with safe_open(inputs, "pt") as file:
        asked = json.loads(file.metadata()["asked"])
        ids, pixels = (file.get_tensor(f"{folder.name}.{name}") for name in ("input_ids", "pixel_values"))
    with torch.no_grad():
        tensors[f"{folder.name}.logits"] = model(input_ids=ids, pixel_values=pixels).logits
    tiles = processor(Image.open(asked["picture"]).convert("RGB"), crop_to_patches=True, return_tensors="pt")
    tensors[f"{folder.name}.tiles"] = tiles["pixel_values"]
    said[folder.name] = {
        "loaded": {key: sorted(map(str, names)) for key, names in loaded.items()},
        "classes": [type(part).__name__ for part in (model, model.model.language_model, processor)],
        "ids": [tokenizer.encode(text) for text in asked["texts"]],
        "prompt": tokenizer.apply_chat_template(asked["conversation"], add_generation_prompt=True, tokenize=False),
        "named": [tokenizer.start_image_token, tokenizer.context_image_token, tokenizer.end_image_token,
                  tokenizer.eos_token, tokenizer.pad_token],
        "stops": model.generation_config.eos_token_id}
    model.save_pretrained(folder.with_name(folder.name + "-again"))
    tokenizer.save_pretrained(folder.with_name(folder.name + "-again"))
save_file(tensors, outputs, {"said": json.dumps(said)})
