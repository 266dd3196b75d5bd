"""The machine's figures, with a pynvml of our own."""

from __future__ import annotations

import sys
import threading
import time
import types

import pytest
import torch

from image_classification.observe.monitor import Monitor


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A GPU of 50 % use, 2 GiB, 300 W, 61 °C, whose energy counter a test moves."""
    fake = types.ModuleType("pynvml")
    fake.joules, fake.open, fake.handles = 1000.0, 0, []

    def init():
        fake.open += 1

    def shutdown():
        fake.open -= 1

    def by_uuid(uuid):
        fake.handles.append(uuid)
        if not uuid.startswith("GPU-"):
            raise NVMLError
        return uuid

    fake.NVMLError = NVMLError
    fake.NVML_TEMPERATURE_GPU = 0
    fake.nvmlInit, fake.nvmlShutdown, fake.nvmlDeviceGetHandleByUUID = init, shutdown, by_uuid
    fake.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=50)
    fake.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=2 * 2**30)
    fake.nvmlDeviceGetPowerUsage = lambda handle: 300_000
    fake.nvmlDeviceGetTemperature = lambda handle, sensor: 61
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: fake.joules * 1000
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    return fake


def fail(*arguments: object) -> float:
    raise NVMLError


def read_with_gpu(monitor: Monitor, num_images: int = 0) -> dict[str, float]:
    """Read once the sampling thread has something."""
    end = time.monotonic() + 10
    figures: dict[str, float] = {}
    while "gpu.temperature_c" not in figures:
        assert time.monotonic() < end
        time.sleep(0.02)
        figures = monitor.read(num_images)
    return figures


def test_gpu_figures_and_their_units(nvml):
    with Monitor(torch.device("cuda", 0), interval=0.01) as monitor:
        figures = read_with_gpu(monitor)
        assert nvml.handles == ["GPU-abc"]
        assert figures["gpu.util"] == 50
        assert figures["gpu.memory_gib"] == 2
        assert figures["gpu.power_w"] == 300
        assert figures["gpu.temperature_c"] == 61
        nvml.joules += 128.0
        assert monitor.read(num_images=64)["train.joules_per_image"] == pytest.approx(2.0)
        assert "train.joules_per_image" not in monitor.read(num_images=0)
    assert nvml.open == 0


def test_means_over_the_samples(nvml):
    powers = iter([100_000, 150_000, 350_000])
    fourth, go_on = threading.Event(), threading.Event()

    def power(handle):
        value = next(powers, None)
        if value is None:  # the fourth sample: three are in the sums
            fourth.set()
            assert go_on.wait(10)
        return value or 300_000

    nvml.nvmlDeviceGetPowerUsage = power
    with Monitor(torch.device("cuda", 0), interval=0.001) as monitor:
        assert fourth.wait(10)
        assert monitor.read()["gpu.power_w"] == pytest.approx(200.0)
        go_on.set()


def test_energy_without_a_counter_is_power_times_time(nvml, monkeypatch):
    nvml.nvmlDeviceGetTotalEnergyConsumption = fail
    with Monitor(torch.device("cuda", 0), interval=0.01) as monitor:
        read_with_gpu(monitor)
        time.sleep(0.1)
        soon = time.monotonic() + 20.0
        monkeypatch.setattr("image_classification.observe.monitor.time.monotonic", lambda: soon)
        joules = monitor.read(num_images=10)["train.joules_per_image"]
    assert joules == pytest.approx(300 * 20.0 / 10, rel=0.05)


def test_figure_that_the_gpu_lacks_is_left_out(nvml):
    nvml.nvmlDeviceGetUtilizationRates = fail
    with Monitor(torch.device("cuda", 0), interval=0.01) as monitor:
        figures = read_with_gpu(monitor)
    assert "gpu.util" not in figures
    assert "gpu.power_w" in figures


@pytest.mark.parametrize("what", ["cpu", "no module", "no driver", "unknown device"])
def test_absent_gpu_is_silent(nvml, monkeypatch, capsys, what):
    device = torch.device("cpu" if what == "cpu" else "cuda")
    if what == "no module":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    if what == "no driver":
        nvml.nvmlInit = fail
    if what == "unknown device":
        nvml.nvmlDeviceGetHandleByUUID = fail
    with Monitor(device) as monitor:
        figures = monitor.read(num_images=5)
    assert set(figures) == {"process.cpu_cores", "process.memory_gib"}
    assert nvml.open == 0
    assert capsys.readouterr() == ("", "")


def test_process_figures():
    with Monitor(torch.device("cpu")) as monitor:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            sum(range(1000))
        busy = monitor.read()
        time.sleep(0.3)
        idle = monitor.read()
    assert idle["process.cpu_cores"] < busy["process.cpu_cores"]
    assert busy["process.cpu_cores"] > 0.1
    assert 0.01 < busy["process.memory_gib"] < 100
