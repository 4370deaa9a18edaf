"""DI: known answers on one layer, the networks' published sizes, and that the default share fits the half it was chosen on."""

import pytest

from narrows.errors import NarrowsError
from narrows.experiments.di_data_type_aware_arithmetic_intensity import correlation, efficiency
from narrows.experiments.networks import NETWORKS, network
from narrows.graph import FP32, Graph, Op
from narrows.machine import machine
from narrows.plan import parse
from narrows.step import Step
from narrows.techniques.profiling_cost_models.di_data_type_aware_arithmetic_intensity import DataTypeAwareIntensity

HERE, ONE = machine("a100-80gb"), Step.forward()
# million parameters and million multiply-adds of the papers' tables (and of torchvision where they differ)
PUBLISHED = {
    "AlexNet": (61, 720), "VGG-16": (138, 15_500), "GoogLeNet": (7, 1_500), "SqueezeNet": (1.25, 840), "ResNet-18": (11.7, 1_800),
    "ResNet-50": (25.5, 4_100), "ResNeXt-50": (25.0, 4_200), "WideResNet-50-2": (68.9, 11_400), "DenseNet-121": (8.0, 2_850),
    "MobileNet": (4.2, 569), "MobileNetV2": (3.5, 300), "ShuffleNet": (1.9, 140), "Xception": (22.9, 8_400),
    "ConvNeXt-T": (28.6, 4_500),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_size(name: str) -> None:
    values = DataTypeAwareIntensity().measure(network(name), HERE, ONE).values
    parameters, macs = PUBLISHED[name]
    assert values["weights"] == pytest.approx(parameters * 1e6, rel=0.04)
    assert values["mac"] == pytest.approx(macs * 1e6, rel=0.08)


def test_one_layer_has_the_intensity_of_its_counts() -> None:
    layer = Op("fc", "linear", {"rows": 1, "inputs": 30, "outputs": 10}, act=FP32, weight=FP32)
    values = DataTypeAwareIntensity(0.75).measure(Graph("g", (layer,)), HERE, ONE).values
    assert values["intensity"] == 300 / (300 + 40)
    assert values["di"] == 300 / (2 * (0.75 * 40 + 0.25 * 300))


def test_half_and_half_is_plain_intensity() -> None:
    for name in NETWORKS:
        values = DataTypeAwareIntensity().baseline().measure(network(name), HERE, ONE).values
        assert values["di"] == pytest.approx(values["intensity"])


def test_counts_are_per_image_whatever_the_batch() -> None:
    one, many = (DataTypeAwareIntensity().measure(network("ResNet-18"), HERE, Step.forward(n)).values for n in (1, 16))
    assert one == pytest.approx(many)


def test_the_default_share_is_the_middle_of_what_fits_the_first_half() -> None:
    half = list(NETWORKS)[0::2]
    found = {share: correlation(DataTypeAwareIntensity(share), half) for share in (0.3, 0.5, 0.7, 0.8, 0.9)}
    assert found[0.8] == max(found.values())
    assert found[0.7] == found[0.9] == found[0.8] > found[0.5] > found[0.3]


def test_for_single_images_plain_intensity_ranks_better() -> None:
    plain, weighed = (correlation(t, list(NETWORKS), batch=1) for t in (DataTypeAwareIntensity(0.5), DataTypeAwareIntensity()))
    assert plain > weighed


def test_the_energy_model_charges_depthwise_networks_more_for_an_operation() -> None:
    assert efficiency("MobileNet", 8) < 0.6 * efficiency("ResNet-18", 8)
    assert efficiency("VGG-16", 1) < efficiency("VGG-16", 8)


def test_refusals_name_the_field() -> None:
    with pytest.raises(NarrowsError, match="activation_share"):
        DataTypeAwareIntensity(1.5)
    with pytest.raises(NarrowsError, match="no op multiplies"):
        DataTypeAwareIntensity().measure(Graph("empty", ()), HERE, ONE)


def test_round_trip() -> None:
    assert parse("di-data-type-aware-arithmetic-intensity:activation_share=0.7") == DataTypeAwareIntensity(0.7)
    assert eval(repr(DataTypeAwareIntensity(0.9))) == DataTypeAwareIntensity(0.9)  # noqa: S307
