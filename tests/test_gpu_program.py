"""What a GPU is given to run, from text as XLA prints it.

The command itself is tested where the compiler for GPUs is installed, which no
extra for tests has.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from fedjax_sim.distributed import make_mesh
from fedjax_sim.engine.program import GPU_GRAPHS, compiler_options

ROOT = pathlib.Path(__file__).resolve().parents[1]

# As XLA prints them, but for metadata: a loop of a known and one of a dynamic
# trip count, a gather, a write in place, a product inside a fusion.
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_gather (param_0: f32[1000,8], param_1: s32[4]) -> f32[4,8] {
  %param_0 = f32[1000,8]{1,0} parameter(0)
  %param_1 = s32[4]{0} parameter(1)
  ROOT %gather.1 = f32[4,8]{1,0} gather(%param_0, %param_1), slice_sizes={1,8}
}

%product (param_0.1: f32[4,8], param_1.1: f32[8,2]) -> f32[4,2] {
  %param_0.1 = f32[4,8]{1,0} parameter(0)
  %param_1.1 = f32[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%param_0.1, %param_1.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_write (param_0.2: f32[80,4,2], param_1.2: f32[4,2], param_2: s32[]) -> f32[80,4,2] {
  %param_0.2 = f32[80,4,2]{2,1,0} parameter(0)
  %param_1.2 = f32[4,2]{1,0} parameter(1)
  %bitcast.1 = f32[1,4,2]{2,1,0} bitcast(%param_1.2)
  %param_2 = s32[] parameter(2)
  ROOT %dynamic-update-slice.1 = f32[80,4,2]{2,1,0} dynamic-update-slice(%param_0.2, %bitcast.1, %param_2)
}

%inner_body (arg: (s32[], f32[80,4,2])) -> (s32[], f32[80,4,2]) {
  %arg = (s32[], f32[80,4,2]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %a = f32[80,4,2]{2,1,0} get-tuple-element(%arg), index=1
  %value = f32[4,2]{1,0} fusion(%i), kind=kLoop, calls=%wrapped_value
  %write = f32[80,4,2]{2,1,0} fusion(%a, %value, %i), kind=kLoop, calls=%fused_write
  %copy.1 = s32[] copy(%i)
  ROOT %tuple.1 = (s32[], f32[80,4,2]{2,1,0}) tuple(%copy.1, %write)
}

%wrapped_value (param_0.3: s32[]) -> f32[4,2] {
  %param_0.3 = s32[] parameter(0)
  %convert.1 = f32[] convert(%param_0.3)
  ROOT %broadcast.1 = f32[4,2]{1,0} broadcast(%convert.1), dimensions={}
}

%inner_condition (arg.1: (s32[], f32[80,4,2])) -> pred[] {
  %arg.1 = (s32[], f32[80,4,2]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %constant.1 = s32[] constant(80)
  ROOT %compare.1 = pred[] compare(%i.1, %constant.1), direction=LT
}

%body (arg.2: (f32[1000,8], s32[4], f32[8,2], s32[], f32[80,4,2])) -> (f32[1000,8], s32[4], f32[8,2], s32[], f32[80,4,2]) {
  %arg.2 = (f32[1000,8]{1,0}, s32[4]{0}, f32[8,2]{1,0}, s32[], /*index=4*/f32[80,4,2]{2,1,0}) parameter(0)
  %x = f32[1000,8]{1,0} get-tuple-element(%arg.2), index=0
  %rows = s32[4]{0} get-tuple-element(%arg.2), index=1
  %kernel = f32[8,2]{1,0} get-tuple-element(%arg.2), index=2
  %gather_fusion = f32[4,8]{1,0} fusion(%x, %rows), kind=kLoop, calls=%fused_gather
  %gemm_fusion = f32[4,2]{1,0} fusion(%gather_fusion, %kernel), kind=kCustom, calls=%product, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %tuple.2 = (s32[], f32[80,4,2]{2,1,0}) tuple(%i.2, %out)
  %while.1 = (s32[], f32[80,4,2]{2,1,0}) while(%tuple.2), condition=%inner_condition, body=%inner_body, backend_config={"known_trip_count":{"n":"80"},"known_init_step":{"init":"0","step":"1"}}
  %call.1 = f32[4,2]{1,0} call(%gemm_fusion), to_apply=%called
  %lt = (f32[4,2]{1,0}, s8[64]{0}) custom-call(%gather_fusion, %kernel), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %tuple.3 = (f32[1000,8]{1,0}, s32[4]{0}, f32[8,2]{1,0}, s32[], /*index=4*/f32[80,4,2]{2,1,0}) tuple(%x, %rows, %kernel, %i.2, %out)
}

%called (param_0.4: f32[4,2]) -> f32[4,2] {
  %param_0.4 = f32[4,2]{1,0} parameter(0)
  ROOT %negate.1 = f32[4,2]{1,0} negate(%param_0.4)
}

%condition (arg.3: (f32[1000,8], s32[4], f32[8,2], s32[], f32[80,4,2])) -> pred[] {
  %arg.3 = (f32[1000,8]{1,0}, s32[4]{0}, f32[8,2]{1,0}, s32[], /*index=4*/f32[80,4,2]{2,1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%arg.3), index=3
  %constant.2 = s32[] constant(7)
  ROOT %compare.2 = pred[] fusion(%i.3, %constant.2), kind=kLoop, calls=%wrapped_value
}

ENTRY %main (p: (f32[1000,8], s32[4], f32[8,2], s32[], f32[80,4,2])) -> (f32[1000,8], s32[4], f32[8,2], s32[], f32[80,4,2]) {
  %p = (f32[1000,8]{1,0}, s32[4]{0}, f32[8,2]{1,0}, s32[], /*index=4*/f32[80,4,2]{2,1,0}) parameter(0)
  ROOT %while.2 = (f32[1000,8]{1,0}, s32[4]{0}, f32[8,2]{1,0}, s32[], /*index=4*/f32[80,4,2]{2,1,0}) while(%p), condition=%condition, body=%body
}
"""  # noqa: E501

THUNKS = """000: kWhile         [source | sink]
condition:
    001: kCustomKernel [source | sink] compare grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=004 (1)]
        002: kCustomKernel [source       | sink        ] gather_fusion
        003: kCustomKernel [source       | sink        ] gemm_fusion
    004: kWhile         [prev=000 (1) | next=000 (1)]
condition:
        005: kCustomKernel [source | sink] compare grid: [1, 1, 1]
      body:
        006: kCopy         [source       | sink        ] kCopy
        000: kCommandBuffer [source       | next=004 (1)]
            007: kCustomKernel [source       | sink        ] value
            008: kCustomKernel [source       | sink        ] write
    009: kCustomKernel [prev=000 (1) | sink        ] negate
    010: kCublasLtMatmul [prev=000 (1) | sink        ]
"""

IN_A_GRAPH = """000: kCommandBuffer [source | sink]
    001: kWhile         [source | sink]
condition:
        002: kCustomKernel [source | sink] compare grid: [1, 1, 1]
      body:
        003: kCustomKernel [source       | sink        ] gather_fusion
"""


@pytest.fixture
def module(monkeypatch):
  """Imports a module of the folder `benchmarks`, which is not installed."""
  monkeypatch.syspath_prepend(str(ROOT))
  return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_loops_are_counted_with_their_trips(module):
  text = module("gpu_text")
  entry, computations = text.parse(PROGRAM)
  assert entry == "main"
  whole = text.work(computations, entry)
  (outer,) = whole.loops
  assert (whole.kernels, outer.trips, outer.condition) == (0, None, 1)
  assert outer.work.kernels == 4  # gather, product, called, library
  assert outer.work.calls == {"__cublas$lt$matmul": 1}
  (inner,) = outer.work.loops
  assert (inner.trips, inner.condition) == (80, 1)
  assert (inner.work.kernels, inner.work.copies) == (3, 1)
  total = outer.work.total
  assert (total.kernels, total.copies) == (4 + 80 * 3, 80)
  assert whole.total.kernels == 0  # nobody knows how often the outer loop runs


def test_bytes_are_those_that_a_kernel_touches(module):
  text = module("gpu_text")
  _, computations = text.parse(PROGRAM)
  gathered = 128 + 16 + 128  # not all 32,000 bytes of the array
  product = 128 + 64 + 32
  negated, library = 32 + 32, 128 + 64 + 32  # without its workspace
  body = text.work(computations, "body")
  assert body.moved_bytes == gathered + product + negated + library
  value, write, copied = 4 + 32, 32 + 4 + 32, 4 + 4  # in place: not 2,560
  assert text.work(computations, "inner_body").moved_bytes == (
    value + write + copied
  )
  assert body.flops == 2 * (2 * 4 * 2 * 8)


def test_sizes_of_types(module):
  nbytes = module("gpu_text").nbytes
  assert nbytes("f32[3,2]{1,0}") == 24
  assert nbytes("(bf16[5]{0}, pred[7]{0}, /*index=2*/f8e4m3fn[2]{0})") == 19
  assert nbytes("s32[]") == 4
  assert nbytes("u4[6]{0}") == 3


CONVOLUTIONS = {
  "__cudnn$convForward": "(f32[20,28,28,64], u8[0])|%x, %k",
  "__cudnn$convBackwardInput": "(f32[20,28,28,32], u8[0])|%y, %k",
  "__cudnn$convBackwardFilter": "(f32[64,3,3,32], u8[0])|%x, %y",
}


@pytest.mark.parametrize("target", CONVOLUTIONS)
def test_a_convolution_costs_the_same_in_its_three_forms(module, target):
  text = module("gpu_text")
  result, operands = CONVOLUTIONS[target].split("|")
  _, computations = text.parse(f"""ENTRY %main (x: f32[1]) -> f32[1] {{
  %x = f32[20,28,28,32]{{3,2,1,0}} parameter(0)
  %k = f32[64,3,3,32]{{3,2,1,0}} parameter(1)
  %y = f32[20,28,28,64]{{3,2,1,0}} parameter(2)
  ROOT %conv = {result} custom-call({operands}), window={{size=3x3 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, custom_call_target="{target}"
}}
""")  # noqa: E501
  found = text.work(computations, "main")
  assert found.flops == 2 * 20 * 28 * 28 * 64 * 9 * 32
  assert found.calls == {target: 1}


def test_of_branches_the_largest_counts(module):
  text = module("gpu_text")
  _, computations = text.parse("""%small (a: f32[2]) -> f32[2] {
  ROOT %a = f32[2]{0} parameter(0)
}

%large (b: f32[2]) -> f32[2] {
  %b = f32[2]{0} parameter(0)
  %sine = f32[2]{0} sine(%b)
  ROOT %cosine = f32[2]{0} cosine(%sine)
}

ENTRY %main (p: pred[], x: f32[2]) -> f32[2] {
  %p = pred[] parameter(0)
  %x = f32[2]{0} parameter(1)
  %y = f32[2]{0} conditional(%p, %x, %x), branch_computations={%small, %large}
  ROOT %z = f32[2]{0} conditional(%p, %y, %y), true_computation=%large, false_computation=%small
}
""")  # noqa: E501
  assert text.work(computations, "main").kernels == 4


def test_graphs_and_loops_that_ask_the_host(module):
  text = module("gpu_text")
  assert text.launches(THUNKS) == [
    text.Launch(graphed=False, graphs=1, loose=2),
    text.Launch(graphed=False, graphs=1, loose=1),
  ]
  assert text.launches(IN_A_GRAPH) == [text.Launch(True, 0, 0)]


def test_time_of_launches(module):
  text, program = module("gpu_text"), module("gpu_program")
  entry, computations = text.parse(PROGRAM)
  whole = text.with_launches(
    text.work(computations, entry), iter(text.launches(THUNKS))
  )
  (outer,) = whole.loops
  node, launch = program.NODE, program.LAUNCH
  inner = program.GRAPH + 2 * node + launch
  asked = program.ASK + launch
  outside = program.GRAPH + 2 * node + 2 * launch
  assert program.launch_seconds(outer) == pytest.approx(
    asked + outside + 80 * inner
  )
  captured = text.Launch(graphed=True, graphs=0, loose=0)
  (nested,) = outer.work.loops
  nested = nested._replace(launch=captured)
  outer = outer._replace(
    launch=captured, work=outer.work._replace(loops=(nested,))
  )
  assert program.launch_seconds(outer) == pytest.approx(
    node * (4 + 1 + 80 * (3 + 1))
  )


def test_speed_of_the_described_device(module):
  program = module("gpu_program")
  speed = program.device(program.TARGET.read_text())
  assert speed.bandwidth == 4.8e12  # an H200's data sheet
  assert speed.flops == pytest.approx(67e12, rel=0.01)
  with pytest.raises(ValueError, match="clock_rate_ghz"):
    program.device("memory_bandwidth: 1 core_count: 2 fpus_per_core: 3")


def test_loops_go_into_graphs_on_a_gpu_alone(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  mesh = make_mesh(1)
  name = "xla_gpu_enable_command_buffer"
  monkeypatch.setenv(GPU_GRAPHS, "1")
  assert compiler_options(mesh, False) == {}
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.delenv(GPU_GRAPHS)
  assert compiler_options(mesh, False) == {}  # nobody asks for it
  monkeypatch.setenv(GPU_GRAPHS, "1")
  assert "WHILE" in str(compiler_options(mesh, False)[name]).split(",")
  monkeypatch.setenv("XLA_FLAGS", f"--{name}=")  # the user wants none
  assert compiler_options(mesh, False) == {}


@pytest.mark.slow  # where it is skipped it counts for no ordinary run
def test_the_command(module, tmp_path):
  if (why := module("gpu_program").missing()) is not None:
    pytest.skip(why)
  written = tmp_path / "program.json"
  done = subprocess.run(
    [
      *(sys.executable, "-m", "benchmarks.gpu_program", "--cases=lr"),
      *("--lanes=1,4", f"--json={written}"),
    ],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout
  results = json.loads(written.read_text())
  assert set(results) == {"lr (1)", "lr (4)"}
  for name, result in results.items():
    assert name in done.stdout
    assert result["step_kernels"] > 0
    assert result["dynamic_loops"] == 3
    # Two products of 10 examples by 784 by 10, for each lane.
    lanes = int(name[4:-1])
    assert result["step_flops"] >= lanes * 2 * 2 * 10 * 784 * 10
    assert result["device_bytes"] > 55_000 * 784 * 4
    assert result["bound"] == "launches"
    assert result["graphed_loops"] == 3  # no host is asked in any


# Of a local step of 16 lanes, with jax 0.10.2.
KERNELS = {"lr": 8, "cnn": 28, "lstm": 511, "resnet18": 305}


@pytest.mark.slow
@pytest.mark.parametrize("case", KERNELS)
def test_a_step_launches_no_more_kernels(module, case):
  program = module("gpu_program")
  if (why := program.missing()) is not None:
    pytest.skip(why)
  options = [f"--cases={case}", "--lanes=16", f"--target={program.TARGET}"]
  result = program.apart(options)
  assert result["step_kernels"] <= KERNELS[case], result
  assert (
    result["graphed_loops"] == result["dynamic_loops"] + (result["known_loops"])
  )
