"""RT-DETR and ViTPose of a few thousand random weights, in transformers' form."""

from pathlib import Path

import torch
import transformers


def write_people_net(folder: Path, *, labels=("cat", "person"), seed: int = 0) -> None:
    """It finds about a person in each of its ten boxes."""
    torch.manual_seed(seed)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, use_timm_backbone=False, encoder_hidden_dim=16, encoder_in_channels=[16, 16, 16],
        encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, num_queries=10, decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2, decoder_n_points=2,
        id2label=dict(enumerate(labels)), label2id={label: n for n, label in enumerate(labels)},
        disable_custom_kernels=True,
    )  # fmt: skip
    net = transformers.RTDetrForObjectDetection(config)
    heads = net.model.enc_score_head, net.model.enc_bbox_head, net.model.decoder
    with torch.no_grad():
        for parameter in (parameter for head in heads for parameter in head.parameters()):
            parameter.normal_(std=0.2)
        for convolution in (part for part in net.modules() if isinstance(part, torch.nn.Conv2d)):
            torch.nn.init.kaiming_normal_(convolution.weight)  # or nothing of the picture would reach the end
        net.model.enc_output[0].bias.zero_()  # or anchors outside the picture, which are all alike, come first
    net.save_pretrained(folder)


def write_pose_net(folder: Path, *, points: int = 17, seed: int = 0) -> None:
    torch.manual_seed(seed)
    backbone = transformers.VitPoseBackboneConfig(
        image_size=[64, 48], patch_size=[16, 16], hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        mlp_ratio=2, out_indices=[1],
    )  # fmt: skip
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=points, use_simple_decoder=True)
    net = transformers.VitPoseForPoseEstimation(config)
    with torch.no_grad():  # in an order of ours, as releases of transformers draw in orders of their own
        for name, parameter in sorted(net.named_parameters()):
            if parameter.ndim > 1 or name.startswith("head."):
                parameter.normal_(std=0.3 if name.startswith("head.") else 0.02)
    net.save_pretrained(folder)
