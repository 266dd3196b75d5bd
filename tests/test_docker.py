"""The image, the launch files, the Makefile and CI: read, compared, and run with stand-ins."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import multiproc
from image_classification.exit_codes import EXIT_SAVED

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTIONS = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "STOPSIGNAL", "CMD"}


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined and comments dropped."""
    text = "\n".join(
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.strip().startswith("#")
    )
    joined = re.sub(r"\\\n\s*", " ", text)
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def arguments_of(instruction: str) -> list[str]:
    return [arguments for name, arguments in dockerfile() if name == instruction]


def ignored(path: str) -> bool:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    return any(fnmatch.fnmatch(path, pattern.removeprefix("**/")) for pattern in patterns)


def name_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return match.group().lower()


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class TestDockerfile:
    def test_base_image_is_pinned(self):
        (base,) = arguments_of("FROM")
        defaults = dict(argument.split("=") for argument in arguments_of("ARG"))
        resolved = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], base)
        assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", resolved)
        assert {name for name, _ in dockerfile()} <= INSTRUCTIONS

    def test_what_is_copied_exists_and_is_not_ignored(self):
        for arguments in arguments_of("COPY"):
            *sources, _ = arguments.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                assert source == "." or not ignored(source), source
        for needed in (
            "pyproject.toml",
            "multiproc.py",
            "LICENSE",
            "docker/install.sh",
            "image_classification",
        ):
            assert not ignored(needed)
        for unwanted in (".git", ".venv", "runs", "__pycache__", "lucidprune.egg-info"):
            assert ignored(unwanted), unwanted

    def test_installs_only_by_the_script_that_ci_runs(self):
        runs = [step for arguments in arguments_of("RUN") for step in arguments.split(" && ")]
        assert runs[:2] == ["docker/install.sh dependencies", "docker/install.sh package"]
        assert not [step for step in runs if re.search(r"\b(pip|apt|apt-get|conda|curl|wget)\b", step)]
        assert "docker/install.sh" in (ROOT / ".ci" / "run").read_text()

    def test_dependencies_are_a_layer_before_the_code(self):
        steps = [f"{name} {arguments}" for name, arguments in dockerfile()]
        assert steps.index("RUN docker/install.sh dependencies") < steps.index("COPY . .")
        assert steps.index("COPY . .") < steps.index("RUN docker/install.sh package")

    def test_command_is_an_exec_form(self):
        (command,) = arguments_of("CMD")
        assert json.loads(command)[0] == "python"  # no shell between the container's signals and Python


class TestInstallScript:
    def dry_run(self, *arguments: str) -> list[str]:
        result = subprocess.run(
            [str(ROOT / "docker" / "install.sh"), "--dry-run", *arguments],
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=True,
        )
        return [line for line in result.stdout.splitlines() if line.startswith("+ ")]

    def test_derives_its_list_from_pyproject(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        lines = list(project["dependencies"])
        for extra in ("train", "explain", "report", "timm"):
            lines += project["optional-dependencies"][extra]
        names = {name_of(line) for line in lines} - {"lucidprune"}
        steps = self.dry_run()
        installed = {name_of(word) for word in steps[0].split() if ">=" in word}
        assert installed == names - {"torch", "torchvision", "nvidia-dali-cuda120"}
        assert {"numpy", "pillow", "scipy", "jinja2", "timm"} <= installed

    def test_keeps_what_the_image_brings(self):
        dependencies, package, check = self.dry_run()
        assert "--constraint" in dependencies
        assert "--no-deps --editable ." in package
        assert "import image_classification, explainers, pruning, multiproc" in check

    @pytest.mark.parametrize(
        ("cuda", "build"),
        [("12.8", "nvidia-dali-cuda120"), ("13.0", "nvidia-dali-cuda130"), (None, "nvidia-dali-cuda120")],
    )
    def test_dali_comes_along_where_the_image_lacks_it(self, cuda, build, monkeypatch):
        namespace = runpy.run_path(str(ROOT / "docker" / "requirements.py"))
        find_spec = importlib.util.find_spec
        assert (namespace["missing_dali"]() is None) == (find_spec("nvidia.dali") is not None)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "nvidia.dali" else find_spec(name)
        )
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert namespace["missing_dali"]() == build
        without, along = (namespace["requirements"](ROOT / "pyproject.toml", dali) for dali in (None, build))
        assert not [line for line in without if "dali" in line]
        assert [name_of(line) for line in along if line not in without] == [build]

    @pytest.mark.parametrize(
        ("after", "code"), [("torch==1 nvidia-dali-cuda130==2", 0), ("torch==2", 1), ("", 1)]
    )
    def test_what_the_image_brings_must_still_be_there_at_the_end(self, tmp_path, after, code):
        """What comes along is no fault; another torch is."""
        lines = r'printf "%s\n" '
        executable(
            tmp_path / "python",
            f"""#!/bin/sh
            case "$*" in
            *--provided*) echo torch ;;
            *"import sys"*)
                cat >/dev/null
                if [ -e {tmp_path}/asked ]; then {lines} {after}; else echo torch==1; fi
                touch {tmp_path}/asked ;;
            esac
            """,
        )
        result = subprocess.run(
            [str(ROOT / "docker" / "install.sh")],
            env=os.environ | {"PYTHON": str(tmp_path / "python")},
            capture_output=True,
            text=True,
        )
        assert result.returncode == code, result.stderr
        assert ("it had torch==1" in result.stderr) == bool(code)

    def test_stages(self):
        assert len(self.dry_run("dependencies")) == 1
        assert len(self.dry_run("package")) == 2

    def test_unknown_argument(self):
        result = subprocess.run(
            [str(ROOT / "docker" / "install.sh"), "--help"], capture_output=True, text=True
        )
        assert result.returncode == 2
        assert "unknown argument '--help'" in result.stderr

    def test_refuses_an_environment_without_torch(self, tmp_path):
        executable(
            tmp_path / "python",
            f'#!/bin/sh\ncase "$1" in -c) cat >/dev/null;; *) exec {sys.executable} "$@";; esac\n',
        )
        result = subprocess.run(
            [str(ROOT / "docker" / "install.sh"), "--dry-run"],
            env=os.environ | {"PYTHON": str(tmp_path / "python")},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        assert "no PyTorch here" in result.stderr


class TestCompose:
    def test_services(self):
        compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
        train = compose["services"]["train"]
        assert train["shm_size"] == "16gb"
        assert train["ulimits"] == {"memlock": -1, "stack": 67108864}
        assert train["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
        assert (ROOT / "docker" / train["build"]["context"] / "Dockerfile").resolve() == ROOT / "Dockerfile"
        assert compose["services"]["tensorboard"]["image"] == train["image"]
        assert int(train["stop_grace_period"].removesuffix("s")) > 120  # the launcher's --shutdown-timeout

    def test_docker_accepts_it(self):
        if (
            shutil.which("docker") is None
            or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
        ):
            pytest.skip("docker compose is not installed")
        subprocess.run(
            ["docker", "compose", "-f", "docker/compose.yaml", "config", "--quiet"], cwd=ROOT, check=True
        )


def kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((ROOT / "docker" / "kubernetes.yaml").read_text())
    return service, job


def recorder(target: Path) -> str:
    """A program that writes its arguments to a JSON file."""
    return f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('{target}', 'w'))\n"


class TestKubernetes:
    def test_job_and_service_fit_each_other(self):
        service, job = kubernetes()
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
        spec, pod = job["spec"], job["spec"]["template"]["spec"]
        assert pod["subdomain"] == service["metadata"]["name"]
        (container,) = pod["containers"]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert spec["completions"] == spec["parallelism"] == int(environment["NNODES"])
        assert spec["completionMode"] == "Indexed"
        assert pod["restartPolicy"] == "Never"  # what podFailurePolicy requires
        # Where one pod fails all end: a limit for the whole job would be reached by one failure on many nodes.
        assert "backoffLimit" not in spec
        assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (6, 0)
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes

    def test_exit_status_of_a_saved_run_is_not_a_failure(self):
        _, job = kubernetes()
        rule = job["spec"]["podFailurePolicy"]["rules"][0]
        assert rule["action"] == "Ignore"
        assert rule["onExitCodes"]["values"] == [EXIT_SAVED]
        assert (
            rule["onExitCodes"]["containerName"] == job["spec"]["template"]["spec"]["containers"][0]["name"]
        )

    def test_command_starts_the_launcher(self, tmp_path):
        _, job = kubernetes()
        pod = job["spec"]["template"]["spec"]
        record = tmp_path / "python.json"
        executable(tmp_path / "python", recorder(record))
        environment = {"NNODES": "2", "JOB_COMPLETION_INDEX": "1", "WORKSPACE": str(tmp_path)}
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(pod["containers"][0]["command"], env=environment | path, check=True)
        script, *arguments = json.loads(record.read_text())
        arguments[arguments.index("gpu")] = "8"
        args = multiproc.parse(arguments)
        assert script == "./multiproc.py"
        assert (args.nnodes, args.node_rank, args.master_addr) == ("2", 1, "lucidprune-0.lucidprune")
        assert pod["terminationGracePeriodSeconds"] > args.shutdown_timeout
        assert args.training_script == "./main.py"
        assert args.training_script_args[-2:] == ["--resume", "auto"]  # no pod decides it for itself
        assert {"cpu", "memory"} <= pod["containers"][0]["resources"]["requests"].keys()


class TestSlurm:
    SCRIPT = ROOT / "docker" / "slurm.sbatch"

    def start(self, folder: Path, srun: str) -> subprocess.Popen[str]:
        executable(folder / "srun", srun)
        executable(
            folder / "scontrol", f'#!/bin/sh\necho "$@" >>{folder}/scontrol.txt\necho node-a\necho node-b\n'
        )
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "WORKSPACE": str(folder),
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
        }
        command = ["bash", str(self.SCRIPT), "/data/imagenet", "--arch", "resnet50"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def test_starts_one_launcher_per_node(self, tmp_path):
        process = self.start(tmp_path, recorder(tmp_path / "srun.json"))
        process.communicate(timeout=30)
        assert process.returncode == 0
        _, cores, python, script, *arguments = json.loads((tmp_path / "srun.json").read_text())
        assert cores == "--cpus-per-task=64"
        assert (python, script) == ("python", "./multiproc.py")
        args = multiproc.parse(arguments)
        assert (args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("2", "8", "c10d")
        assert re.fullmatch(r"node-a:\d{5}", args.rdzv_endpoint)
        assert args.training_script_args[:3] == ["/data/imagenet", "--arch", "resnet50"]
        assert args.training_script_args[-2:] == ["--resume", "auto"]
        assert "requeue" not in (tmp_path / "scontrol.txt").read_text()
        limit = re.search(r"--signal=B:USR1@(\d+)", self.SCRIPT.read_text())
        assert limit is not None
        assert int(limit[1]) > args.shutdown_timeout

    @pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
    def test_saved_after_the_signal_is_queued_again(self, tmp_path, signum):
        """SIGTERM would make srun kill its tasks: they get SIGUSR1 for it."""
        process = self.start(
            tmp_path,
            f"#!/bin/bash\ntrap 'sleep 0.5; exit {EXIT_SAVED}' USR1\ntouch {tmp_path}/up\n"
            "while :; do sleep 0.1; done\n",
        )
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == EXIT_SAVED, output
        assert "requeue 1234567" in (tmp_path / "scontrol.txt").read_text()

    def test_failure_is_not_queued_again(self, tmp_path):
        process = self.start(tmp_path, "#!/bin/sh\nexit 3\n")
        process.communicate(timeout=30)
        assert process.returncode == 3
        assert "requeue" not in (tmp_path / "scontrol.txt").read_text()


@pytest.mark.parametrize("script", ["docker/install.sh", "docker/slurm.sbatch", ".ci/run"])
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_ci_is_executable_and_runs_the_readme_commands():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert os.access(ROOT / "docker" / "install.sh", os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert re.search(r"^step make test$", text, re.MULTILINE)
    assert re.search(r"^step make lint$", text, re.MULTILINE)


class TestMakefile:
    def dry_run(self, target: str, folder: Path) -> list[str]:
        """The commands that a target would run on a fresh machine (no .venv yet)."""
        if shutil.which("make") is None:
            pytest.skip("make is not installed")
        # `make test` itself runs this test: an inner make must not take itself for a part of the outer one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(
            ["make", "--dry-run", f"VENV={folder}/venv", target],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()

    @pytest.mark.parametrize("target", ["test", "demo", "lint", "docs", "benchmarks"])
    def test_everything_installs_first(self, tmp_path, target):
        commands = self.dry_run(target, tmp_path)
        install = self.dry_run("install", tmp_path)
        assert commands[: len(install)] == install
        assert any("pip install --editable '.[dev]'" in command for command in install)

    def test_fast_tests_come_before_slow_ones(self, tmp_path):
        assert [line.split(" -m ")[-1] for line in self.dry_run("test", tmp_path)[-2:]] == [
            "'not slow'",
            "slow",
        ]

    def test_install_happens_once(self, tmp_path):
        (tmp_path / "venv" / "bin").mkdir(parents=True)
        (tmp_path / "venv" / "bin" / "python").touch()
        (tmp_path / "venv" / ".installed").touch()
        assert not [line for line in self.dry_run("install", tmp_path) if "pip" in line]

    def test_old_python_is_refused_with_the_way_out(self, tmp_path):
        if shutil.which("make") is None:
            pytest.skip("make is not installed")
        executable(tmp_path / "python3", "#!/bin/sh\nexit 1\n")
        result = subprocess.run(
            ["make", f"VENV={tmp_path}/venv", f"PYTHON={tmp_path}/python3", "install"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode != 0
        assert "Python 3.11.4 or newer is needed: make install PYTHON=python3.12" in result.stderr


def test_pre_commit_uses_the_tools_of_the_dev_extra():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    commands = [hook["entry"].split()[0] for repo in config["repos"] for hook in repo["hooks"]]
    extra = " ".join(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    )
    assert all(command in extra for command in commands if command != "bash")


def test_license_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert all(f"\n   {section}. " in text for section in range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text
