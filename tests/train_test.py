"""The command line as a user types it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import train  # noqa: E402

GC = '--config=configs/resnet_gc.py'


@pytest.fixture(autouse=True)
def _at_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], '--config is missing: give it a file of configs/'),
        (['--config=configs/resnet_cg.py'], 'does not exist, did you mean configs/resnet_'),
        (['--config=resnet_gc'], 'config file resnet_gc does not exist, did you mean configs/resn'),
        ([f'{GC}:mars'], "config argument 'mars' is unknown: use one of digits, cifar10, imagenet"),
        ([GC, '--config.train.epoch=3'], 'no such key, did you mean --config.train.epochs'),
        ([GC, '--config.foo.bar=3'], '--config.foo.bar: there is no such key'),
        ([GC, '--config.train.epochs=four'], "invalid literal for int() with base 10: 'four'"),
        ([GC, '--config.train=4'], "Failed to parse '4' as a ConfigDict"),
        ([GC, '--wokdir=x'], "Unknown command line flag 'wokdir'. Did you mean: workdir"),
        ([GC, 'x'], "unexpected argument 'x': options start with --"),
        ([GC, '--config.task=segmentation'], "task 'segmentation' is unknown"),
        ([GC, '--config.model.name=tiny_resent'], 'did you mean tiny_resnet'),
        ([GC, '--config.model.attention=cbma'], "attention 'cbma' is not registered: did you mean"),
        ([GC, '--config.model.attention_args.reductoin=4'], 'did you mean reduction'),
        ([GC, '--config.model.placement=nowhere'], 'nowhere'),
        ([GC, '--config.model.arguments.zero_init=True'], 'did you mean zero_init_last'),
        ([GC, '--config.data.name=cifar11'], "'cifar11' is neither 'digits' nor a TFDS data set"),
        ([GC, '--config.data.split=trian'], "'digits' has no 'trian'; it has train"),
        ([GC, '--config.data.test_split=val'], "'digits' has no 'val'; it has train"),
        (
            [f'{GC}:cifar10', '--config.data.data_dir=/none'],
            "'/none' is not a directory; prepare it",
        ),
        ([GC, '--config.train.batch_size=0'], 'train.batch_size must be at least 1, got 0'),
        ([GC, '--config.train.batch_size=60'], 'divisible by the 8 devices: use 56 or 64'),
        ([GC, '--config.mesh.fsdp=3'], 'mesh.fsdp 3 must be the number of devices, 8'),
        ([GC, '--config.optimizer.name=lamb'], "optimizer.name 'lamb' is unknown"),
        ([GC, '--config.schedule.warmup_epochs=15'], 'must be shorter than the run of 15 epochs'),
        ([GC, '--eval_only'], 'holds no checkpoint: train first'),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_written(
    arguments, message, tmp_path, capsys
):
    status = train.main(['train.py', f'--workdir={tmp_path / "run"}', *arguments])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith('error: ')
    assert error.count('\n') == 1
    assert message in error
    assert not (tmp_path / 'run').exists()


def test_options_in_every_spelling(monkeypatch):
    from attention_jax import training

    calls = []
    monkeypatch.setattr(training, 'train', lambda *arguments: calls.append(arguments))
    arguments = (
        '--config configs/resnet_se.py:cifar10 --config.train.epochs 3 --noconfig.data.cache '
        '--config.schedule.boundaries=(0.25,) --config.optimizer.learning_rate=1 '
        '--config.model.attention_args.reduction=4 --config.model.arguments.zero_init_last=True'
    )
    assert train.main(['train.py', *arguments.split()]) == 0
    ((config, workdir),) = calls
    assert workdir == 'runs/resnet_se-cifar10'
    assert (config.train.epochs, config.data.cache) == (3, False)
    assert config.schedule.boundaries == (0.25,)
    assert config.optimizer.learning_rate == 1.0
    assert config.model.attention_args.to_dict() == {'reduction': 4}
    assert config.model.arguments.to_dict() == {'zero_init_last': True}
    assert config.is_locked


def test_a_bug_keeps_its_traceback_and_an_interrupt_its_status(monkeypatch, capsys):
    from attention_jax import training

    def bug(*arguments):
        json.loads('{')  # a ValueError that nobody here has written for a user

    def interrupt(*arguments):
        raise KeyboardInterrupt

    def not_finite(*arguments):
        raise FloatingPointError('not finite at step 2')

    monkeypatch.setattr(training, 'train', bug)
    with pytest.raises(json.JSONDecodeError):
        train.main(['train.py', GC])
    monkeypatch.setattr(training, 'train', interrupt)
    assert train.main(['train.py', GC]) == 130
    monkeypatch.setattr(training, 'train', not_finite)
    assert train.main(['train.py', GC]) == 1
    assert capsys.readouterr().err == 'error: not finite at step 2\n'


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / 'train.py'), *arguments],
        env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_imports_no_training():
    code = (
        'import sys, train; status = train.main(["train.py", "--help"]); '
        'assert "jax" not in sys.modules; sys.exit(status)'
    )
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert '--config FILE[:DATASET]' in result.stdout


@pytest.mark.slow
def test_from_the_command_to_the_results(tmp_path):
    workdir = str(tmp_path / 'run')
    command = ('--config', 'configs/resnet_gc.py', '--workdir', workdir)
    short = ('--config.train.steps=30', '--config.schedule.warmup_epochs=0')
    result = run(*command, *short)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ''
    assert 'Compiling for 1 x cpu' in result.stdout
    assert 'step 22/30  epoch ' in result.stdout
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['test/accuracy'] > 0.2

    again = run(*command, *short)
    assert again.returncode == 0
    assert 'holds the finished run' in again.stdout
    only = run(*command, *short, '--eval_only')
    assert f'test/accuracy {summary["test/accuracy"]:.4f}' in only.stdout
    other = run(*command, *short, '--config.optimizer.learning_rate=0.5')
    assert other.returncode == 2
    assert 'optimizer.learning_rate is 0.1 there and 0.5 here' in other.stderr
    assert other.stderr.count('\n') == 1
