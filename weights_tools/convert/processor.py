"""The files beside config.json and the weights: tokenizer, image processor, chat template, in both layouts.

    original                                    -hf
    vocab.json, merges.txt, added_tokens.json   tokenizer.json, the same recipe spelled out; tokenizer_config.json
    tokenizer.model (InternLM2)                 the same file too: it cannot be made from tokenizer.json again
    preprocessor_config.json                    another preprocessor_config.json, for the class that cuts tiles
    -                                           processor_config.json, video_preprocessor_config.json, chat template

The chat template writes what minivl.prompt writes, the original's system text where none is given included: the -hf
repositories on the hub leave that out. Two differences remain: transformers cannot leave the thumbnail out, and does
not tidy the text of an InternLM2 model ("boat ." for "boat.").
Source: convert_internvl_weights_to_hf.py @015d3b27; processing_internvl.py, image_processing_pil_got_ocr2.py,
tokenization_utils_tokenizers.py of transformers 5.23.0.
"""
from __future__ import annotations

import json
import warnings
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, processors

from minivl.config import Config
from minivl.internlm2_tokenizer import FORCED
from minivl.limits import InputError, is_there
from minivl.preprocess import most_tiles
from minivl.prompt import CONTEXT, SYSTEM
from minivl.sentencepiece import SPACE, USER_DEFINED, read_model
from minivl.tiling import MEAN, STD
from minivl.tokenizer import MODEL_FILE, Tokenizer
from weights_tools.files import small_files
from weights_tools.synthesize import json_text, preprocessor_config

VIDEO = "<video>"       # transformers replaces it before it encodes; it adds it to the tokenizer, the original has none
NAMED = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": CONTEXT,
         "video_token": VIDEO}
TEMPLATE = """\
{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' }}{% endif %}\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}{% elif part['type'] == 'video' %}{{ '<video>\\n' }}\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def hf_files(folder: Path, config: Config) -> tuple[int, dict[str, bytes]]:
    """Make the files of the -hf layout beside config.json: (id of <IMG_CONTEXT>, name -> content)."""
    tokenizer = Tokenizer.load(folder)
    if not config.use_thumbnail:
        warnings.warn("config.json has use_thumbnail false; transformers' image processor adds a thumbnail to every "
                      "picture of several tiles all the same", stacklevel=2)
    system = SYSTEM if config.system_message is None else config.system_message
    most = most_tiles(config)
    pixels = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
              "image_mean": list(MEAN), "image_std": list(STD), "processor_class": "InternVLProcessor", "resample": 3,
              "rescale_factor": 1 / 255, "size": dict.fromkeys(("height", "width"), config.force_image_size)}
    texts = {
        "chat_template.jinja": TEMPLATE.replace("SYSTEM", json.dumps(system, ensure_ascii=False)),
        # llm_config.eos_token_id, which generate() takes where there is no such file, is </s> in InternLM2's.
        "generation_config.json": json_text({"eos_token_id": tokenizer.id("<|im_end|>")}),
        "preprocessor_config.json": json_text({
            **pixels, "crop_to_patches": True, "image_processor_type": "GotOcr2ImageProcessor", "max_patches": most,
            "min_patches": min(config.min_dynamic_patch, most)}),
        "processor_config.json": json_text({"image_seq_length": config.num_image_token,
                                            "processor_class": "InternVLProcessor"}),
        "tokenizer.json": (_backend_internlm2(tokenizer, folder) if tokenizer.begin else tokenizer.backend).to_str(),
        "tokenizer_config.json": json_text(_hf_tokenizer_config(tokenizer, config)),
        "video_preprocessor_config.json": json_text({**pixels, "video_processor_type": "InternVLVideoProcessor"})}
    made = {name: text.encode("utf-8") for name, text in texts.items()}
    return tokenizer.id(CONTEXT), made | _carried(folder)


def _carried(folder: Path) -> dict[str, bytes]:
    """Read the files that both layouts share, where they are there."""
    return {name: data for name, data in small_files(folder).items() if name in ("generation_config.json", MODEL_FILE)}


def _backend_internlm2(tokenizer: Tokenizer, folder: Path) -> tokenizers.Tokenizer:
    """Spell out InternLM2's recipe for the library: what minivl.internlm2_tokenizer does around the merges.

    One difference: a text that spells [UNUSED_TOKEN_n] of a piece that an added token has taken is merged like any.
    """
    model = read_model(folder / MODEL_FILE)
    data = json.loads(tokenizer.backend.to_str())
    data["model"] |= {"unk_token": "<unk>", "fuse_unk": True}
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE)] * model.dummy_prefix
                                              + [normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
                                        + [decoders.Strip(" ", 1, 0)] * model.dummy_prefix)
    taken = set(tokenizer.added.values())
    backend.add_tokens([AddedToken(piece.text, normalized=True) for i, piece in enumerate(model.pieces)
                        if piece.type == USER_DEFINED and i not in taken])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", tokenizer.begin[0])])
    return backend


def _hf_tokenizer_config(tokenizer: Tokenizer, config: Config) -> dict:
    """Make tokenizer_config.json for a class that takes tokenizer.json as it is, in transformers 4 and 5."""
    return {**_tokenizer_config(tokenizer, tokenizer.added), "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>", "extra_special_tokens": NAMED, "padding_side": "left",
            "processor_class": "InternVLProcessor", "model_max_length": config.llm_config.max_position_embeddings}


def _tokenizer_config(tokenizer: Tokenizer, added: dict[str, int]) -> dict:
    """Make tokenizer_config.json of the original layout, with these added tokens: token -> id."""
    listed = {str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                       "special": i in tokenizer.special_ids} for token, i in added.items()}
    if tokenizer.begin:
        named = {"tokenizer_class": "InternLM2Tokenizer", "add_bos_token": True, "add_eos_token": False,
                 "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    else:
        pad = "<|endoftext|>" if "<|endoftext|>" in added else "<|im_end|>"
        named = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "unk_token": None,
                 "pad_token": pad}
    return {**named, "added_tokens_decoder": listed, "clean_up_tokenization_spaces": False}


def original_files(folder: Path, config: Config) -> dict[str, bytes]:
    """Make the files of the original layout beside config.json from those of an -hf folder: name -> content."""
    internlm2 = config.llm_config.architectures[0] == "InternLM2ForCausalLM"
    if internlm2 and not is_there(folder / MODEL_FILE):
        raise InputError(f"{folder} has no {MODEL_FILE}, which the original layout of an InternLM2 model needs and "
                         "tokenizer.json cannot replace; copy it there from the original release")
    tokenizer = Tokenizer.load(folder)
    added = {token: i for token, i in tokenizer.added.items() if token != VIDEO}
    texts = {"preprocessor_config.json": json_text(preprocessor_config(config.force_image_size)),
             "tokenizer_config.json": json_text(_tokenizer_config(tokenizer, added)),
             "added_tokens.json": json_text({token: i for token, i in added.items() if token not in FORCED})}
    if not internlm2:
        model = json.loads(tokenizer.backend.to_str())["model"]
        words = {token: i for token, i in model["vocab"].items() if token not in tokenizer.added}
        texts["vocab.json"] = json.dumps(words, ensure_ascii=False) + "\n"
        texts["merges.txt"] = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]) + "\n"
    return {name: text.encode("utf-8") for name, text in texts.items()} | _carried(folder)
