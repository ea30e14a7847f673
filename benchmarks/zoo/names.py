"""The networks that are measured: every classification network of torchvision, and a fixed choice of timm's."""

from __future__ import annotations

from bnexport.optional import require

#: timm's convolutional networks by family, the small ones of each; fixed, so that two runs can be compared.
TIMM: dict[str, tuple[str, ...]] = {
    "resnet": (
        "resnet10t", "resnet18", "resnet26d", "resnet50", "resnet50d", "resnet50_mlp", "resnet101", "resnet32ts", "resnet51q",
        "resnet50_clip", "resnetaa50", "resnetblur18", "resnetblur50", "resnetrs50", "wide_resnet50_2", "resnext26ts",
        "resnext50_32x4d", "seresnet18", "seresnext26t_32x4d", "ecaresnet26t", "ecaresnetlight", "gcresnet33ts",
        "legacy_seresnet18", "senet154", "bat_resnext26ts",
    ),
    "resnetv2": ("resnetv2_18", "resnetv2_18d", "resnetv2_50", "resnetv2_50d", "resnetv2_50t", "resnetv2_101"),
    "resnest and sknet": ("resnest14d", "resnest50d", "skresnet18", "skresnet34", "skresnext50_32x4d"),
    "res2net": ("res2net50_26w_4s", "res2net50d", "res2next50", "res2net101_26w_4s"),
    "densenet": ("densenet121", "densenet169", "densenet201", "densenetblur121d"),
    "dpn": ("dpn48b", "dpn68", "dpn68b", "dpn92"),
    "mixnet": ("mixnet_s", "mixnet_l", "tf_mixnet_m"),
    "efficientnet": (
        "efficientnet_b0", "efficientnet_b1", "efficientnet_b3", "efficientnet_lite0", "efficientnet_es",
        "efficientnet_blur_b0", "efficientnet_cc_b0_4e", "efficientnet_b1_pruned", "efficientnetv2_rw_t", "efficientnetv2_s",
        "tf_efficientnet_b0", "tf_efficientnet_lite0", "tf_efficientnetv2_b0", "gc_efficientnetv2_rw_t",
    ),
    "mobilenet": (
        "mobilenetv1_100", "mobilenetv1_100h", "mobilenetv2_050", "mobilenetv2_110d", "mobilenetv3_small_100",
        "mobilenetv3_large_100", "mobilenetv3_rw", "tf_mobilenetv3_small_minimal_100", "mobilenetv4_conv_small",
        "mobilenetv4_conv_blur_medium", "mobilenetv4_hybrid_medium", "mobilenetv5_base", "mobilenet_edgetpu_100",
    ),
    "searched": (
        "mnasnet_100", "mnasnet_small", "semnasnet_100", "spnasnet_100", "fbnetc_100", "fbnetv3_b", "hardcorenas_a",
        "hardcorenas_f", "tinynet_a", "tinynet_e", "lcnet_050", "lcnet_100", "lcnetv2_base", "nasnetalarge", "pnasnet5large",
    ),
    "regnet": (
        "regnetx_002", "regnetx_016", "regnety_002", "regnety_016", "regnety_040_sgn", "regnetv_040", "regnetz_005",
        "regnetz_b16", "regnetz_d8",
    ),
    "parallel branches": (
        "repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "mobileone_s0", "mobileone_s4", "repvit_m0_9", "repvit_m1",
        "repghostnet_050", "repghostnet_100",
    ),
    "ghostnet": ("ghostnet_050", "ghostnet_100", "ghostnetv2_100", "ghostnetv3_050", "ghostnetv3_100"),
    "rexnet": ("rexnet_100", "rexnetr_100"),
    "vgg and vovnet": ("vgg11_bn", "vgg16_bn", "vovnet39a", "ese_vovnet19b_dw", "ese_vovnet39b", "eca_vovnet39b"),
    "csp and darknet": (
        "cspresnet50", "cspresnext50", "cspdarknet53", "cs3darknet_s", "cs3darknet_focus_s", "cs3sedarknet_l", "cspnext_tiny",
        "darknet17", "darknet53", "sedarknet21",
    ),
    "gernet": ("gernet_s", "gernet_m"),
    "hrnet": ("hrnet_w18_small", "hrnet_w18_small_v2", "hrnet_w18"),
    "dla": ("dla34", "dla46x_c", "dla60", "dla60_res2net", "dla102"),
    "hgnet": ("hgnet_tiny", "hgnetv2_b0", "hgnetv2_b2"),
    "inception": ("inception_v3", "inception_v4", "inception_resnet_v2", "inception_next_atto"),
    "xception": ("legacy_xception", "xception41", "xception41p", "xception65p"),
    "selecsls and tresnet": ("selecsls42", "selecsls60b", "tresnet_m", "tresnet_v2_l"),
    "convmixer": ("convmixer_768_32", "convmixer_1024_20_ks9_p14"),
    "starnet and fasternet": ("starnet_s1", "starnet_s050", "fasternet_t0", "shvit_s1"),
    "convolution and attention": (
        "levit_128s", "levit_256", "levit_conv_128s", "edgenext_xx_small", "edgenext_small_rw", "fastvit_t8", "fastvit_sa12",
        "fastvit_mci0", "mobilevit_xxs", "mobilevitv2_050", "efficientformer_l1", "efficientformerv2_s0", "efficientvit_b0",
        "efficientvit_m0", "efficientvit_l1", "swiftformer_xs", "nextvit_small", "visformer_tiny", "botnet26t_256",
        "halonet26t", "lambda_resnet26t", "coatnet_bn_0_rw_224", "maxvit_pico_rw_256", "tiny_vit_5m_224",
        "xcit_nano_12_p16_224",
    ),
}  # fmt: skip


def sources() -> tuple[str, ...]:
    """Every network as ``torchvision:NAME`` or ``timm:NAME``, torchvision first.

    Raises:
        MissingDependency: torchvision is not installed.
    """
    models = require("torchvision.models", purpose="the measurement of networks")
    torchvision = sorted(models.list_models(module=models))
    timm = [name for family in TIMM.values() for name in family]
    return (*(f"torchvision:{name}" for name in torchvision), *(f"timm:{name}" for name in timm))
