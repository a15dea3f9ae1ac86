"""The words that most packs share, by which descriptions are deflated.

A dictionary belongs to its format version: packs could not be read if a byte of it changed. The
most frequent words come last, where deflate refers to them with the fewest bits.
"""

from __future__ import annotations

import functools


@functools.cache
def dictionary(version: int) -> bytes:
    """The dictionary of a format version."""
    return _words_of_2() if version < 5 else _words_of_2() + _WORDS_SINCE_5


_WORDS_SINCE_5 = (
    b'"lora":{"bits":4,"dropout":0.1,"rank":4,"scale":1.0,"targets":["q","v"]},'
    b'"prompts":{"bits":8,"count":10,"deep":false},"ssf":{"bits":8},"class_token":{"bits":8},'
    b'"full":{"bits":1},"quantiser":{"codebook":"lloyd_max","scales":"row"},'
    b'"kind":"multilabel","metric":"mAP","f1","auroc","balanced_accuracy","modality":"points",'
    b'"kind":"segmentation","metric":"mIoU","modality":"images","recipe":{'
    b'"adapter":{"bits":1,"dropout":0.1,"placement":"after_mlp","scale":0.1,"width":8},'
    b'{"metadata":{"backbone":{"arguments":{"depth":12,"embed_dim":192,"img_size":32,"num_heads":3,'
    b'"patch_size":4},"fingerprint":"","model":"vit_small_patch16_224.augreg_in21k","trail":"'
    b'"},"classes":["0","1","2","3","4","5","6","7","8","9"],"input":{"interpolation":"bicubic",'
    b'"mean":[0.485,0.456,0.406],"size_px":224,"std":[0.229,0.224,0.225]},'
    b'"mean":[0.5,0.5,0.5],"size_px":32,"std":[0.5,0.5,0.5]},'
    b'"kind":"classification","metric":"accuracy","modality":"images","recipe":{'
    b'"biases":{"bits":8},"connections":{"bits":8,"top_k":1},"head":{"bias":true,"bits":8},'
    b'"norms":{"bits":8,"parameters":"all","which":"mlp"},"smoa":{"balance_weight":0.01,"bits":4,'
    b'"experts":4,"heads":1,"placement":"parallel","prompt_generator":false,"router_width":8,'
    b'"scale":1.0,"temperature":0.1,"top_k":1,"width":8},"training":{"augment":"none",'
    b'"batch_size":32,"cutmix":0.0,"drop_path":0.0,"ema":0.0,"epochs":12,"label_smoothing":0.0,'
    b'"learning_rate":0.008,"mixup":0.0,"precision":"bf16","warmup_epochs":1.0,'
    b'"weight_decay":0.0}},"seed":0,"selection":{"batch_size":32,"criterion":"gradient",'
    b'"level":"neuron","loss":"contrastive","precision":"fp32","seed":0,"temperature":0.07,'
    b'"views":"strong"},"task":"'
    b'"},"parts":[{"bits":8,"layers":[[192,64],[64,64],[256,64],[64,256]],"name":"connections",'
    b'"positions":"recomputed","tensors":[["patch_embed.proj",[192]],["blocks.0.attn.qkv",[576]],'
    b'{"bits":8,"name":"biases","tensors":[["patch_embed.proj",[192]],'
    b'{"bits":8,"name":"norms","tensors":[["blocks.0.norm2.weight",[192]],'
    b'{"bits":1,"by_row":true,"codebook":"lloyd_max","has_mean":false,"name":"head",'
    b'"tensors":[["head.weight",[10,192]]]},{"bits":16,"name":"head","tensors":[["head.bias",[10]]]}'
    b'],"probe":2}'
)


def _words_of_2() -> bytes:
    """Of versions 2 to 4."""
    blocks = "".join(
        f'["blocks.{block}.attn.qkv",[576]],["blocks.{block}.attn.proj",[192]],'
        for block in range(12)
    )
    layers = "".join(
        f'["blocks.{block}.mlp.fc1",[768]],["blocks.{block}.mlp.fc2",[192]],' for block in range(12)
    )
    norms = "".join(
        f'["blocks.{block}.norm2.weight",[768]],["blocks.{block}.norm2.bias",[768]],'
        for block in range(12)
    )
    stages = "layers.0.blocks.0.attn.qkvstages.0.blocks.0.conv_dw.downsample.reduction.stem.0vit_base_patch16_224.augreg_in21kswin_tinyconvnext_tiny"
    arguments = (
        '"depth":12,"embed_dim":768,"img_size":224,"num_heads":12,"patch_size":16},"fingerprint":"'
    )
    head = '{"bits":8,"name":"head","tensors":[["head.weight",[10,768]]]},{"bits":16,"name":"head","tensors":[["head.bias",[10]]]}],"probe":2}'
    bank = '"name":"adapters","tensors":[["smoa.768.down",[4,8,768]],["smoa.768.up",[4,768,8]],["smoa.768.router",[8,768]],'
    return (
        f'{stages}{bank}["smoa.768.embeddings",[4,8]]]{norms}{blocks}{layers}["patch_embed.proj",[768]],"layers":[[2304,768],[768,768],[3072,768],[768,3072],'
        '"positions":"recomputed"},{"bits":4,"name":"connections","positions":{"bits":8,"name":"biases","tensors":[{"bits":8,"name":"norms","tensors":['
        f'{{"metadata":{{"backbone":{{"arguments":{{{arguments}","model":"vit_","trail":"'
        '"},"classes":["0","1","2","3","4","5","6","7","8","9"],"input":{"interpolation":"bicubic","mean":[0.485,0.456,0.406],"size_px":224,'
        '"std":[0.229,0.224,0.225]},"mean":[0.5,0.5,0.5],"metric":"accuracy","recipe":{"biases":{"bits":8},"connections":{"bits":8,"top_k":1},'
        '"head":{"bits":8},"norms":{"bits":8},"smoa":{"balance_weight":0.01,"bits":4,"experts":4,"router_width":8,"scale":1.0,"temperature":0.1,'
        '"width":8},"training":{"augment":false,"batch_size":32,"epochs":12,"label_smoothing":0.0,"learning_rate":0.008,"precision":"bf16",'
        '"warmup_epochs":1.0,"weight_decay":0.0}},"seed":0,"selection":{"batch_size":32,"criterion":"gradient",'
        f'"level":"neuron","loss":"contrastive","precision":"fp32","temperature":0.07}},"task":"{head}'
    ).encode()
