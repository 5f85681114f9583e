"""Programs of which none may pass, get out, outlive its limit or leave anything."""

from tests.grading.jailed import probes

LIES = """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 1
    def __bool__(self): return True
    def __getattr__(self, name): return lambda *a: True
"""
# Each must fail against `assert f(1) == SECRET`; one that says `return SECRET` has got out if it passes.
FORGED = {name: LIES + code for name, code in probes("""
# always_equal
def f(x): return Yes()
# always_equal_class
def f(x): return Yes
# always_equal_number
class Number(Yes, int): pass
def f(x): return Number(1)
# always_equal_in_a_list
def f(x): return [Yes()]
# always_equal_metaclass
class Meta(type):
    def __eq__(self, other): return True
    __hash__ = None
class Thing(metaclass=Meta): pass
def f(x): return Thing
""").items()}  # fmt: skip
FORGED |= probes(r"""
# exit_at_load
import sys
sys.exit(0)
# exit_in_call
import sys
def f(x): sys.exit(0)
# os_exit_at_load
import os
os._exit(0)
# os_exit_in_call
import os
def f(x): os._exit(0)
# exec_in_call
import os, sys
def f(x): os.execv(sys.executable, [sys.executable, '-c', 'pass'])
# kill_self
import os
def f(x): os.kill(os.getpid(), 9)
# look_out_of_time
import os, signal
def f(x): os.kill(os.getpid(), signal.SIGXCPU)
# crash
import ctypes
def f(x): ctypes.string_at(0)
# verdict_on_every_descriptor
import os
def f(x):
    for fd in range(64):
        try: os.write(fd, b'["", "passed", ""]')
        except OSError: pass
    os._exit(0)
# frames
import re, sys
def f(x):
    frame, seen = sys._getframe(), ''
    while frame:
        seen += repr([frame.f_locals, frame.f_globals, frame.f_code.co_consts])
        frame = frame.f_back
    return int(re.search(r'f\(1\) == ([0-9]{8,9})', seen)[1])
# heap
import gc, re
def f(x):
    for thing in gc.get_objects():
        for value in gc.get_referents(thing):
            if isinstance(value, str) and (found := re.search(r'f\(1\) == ([0-9]{8,9})', value)):
                return int(found[1])
# memory_of_this_process
import re
def f(x):
    return int(re.search(rb'f\(1\) == ([0-9]{8,9})', open('/proc/self/mem', 'rb').read())[1])
# builtins
import builtins
builtins.AssertionError = type('A', (), {})
builtins.isinstance = lambda *a: True
builtins.type = lambda *a: int
builtins.compile = builtins.exec = lambda *a, **k: None
def f(x): return True
# modules
import sys, types
main, fake = sys.modules['__main__'], types.ModuleType('json')
fake.dumps = lambda message: '["value", {"handle": "f"}]'
main.json = sys.modules['json'] = fake
main.receive = lambda fd: ['call', {'handle': 'f'}, [1], {'dict': []}]
def f(x): return 1
# protocol_handle
import sys
sys.modules['__main__'].encode = lambda *a: {'handle': []}
def f(x): return 1
# protocol_type
import sys
sys.modules['__main__'].encode = lambda *a: {'type': 'eval'}
def f(x): return 1
# protocol_unhashable
import sys
sys.modules['__main__'].encode = lambda *a: {'set': [[]]}
def f(x): return 1
# protocol_two_keys
import sys
sys.modules['__main__'].encode = lambda *a: {'int': '1', 'set': []}
def f(x): return 1
# protocol_deep
import json
json.dumps = lambda message: '[' * 99999 + ']' * 99999
def f(x): return 1
# protocol_replies_ahead
import os
for fd in range(64):
    try: os.write(fd, b'\0\0\0\x0f["value", true]' * 9)
    except OSError: pass
def f(x): return True
# protocol_length
import os
def f(x):
    for fd in range(64):
        try: os.write(fd, b'\xff' * 8)
        except OSError: pass
# raise_exit
def f(x): raise SystemExit(0)
# raise_interrupt
def f(x): raise KeyboardInterrupt
# raise_stop
def f(x): raise StopIteration
# raise_named
E = type('SystemExit', (Exception,), {})
def f(x): raise E(0)
# long_answer
def f(x): return 'x' * (1 << 25)
# deep_answer
def f(x):
    a = []
    for _ in range(10**5): a = [a]
    return a
# recursion
def f(x): return f(x)
# atexit
import atexit, os
atexit.register(lambda: os._exit(0))
def f(x): raise SystemExit(0)
# close_all
import os
os.closerange(0, 64)
def f(x): return SECRET
# kill_everybody
import os
def f(x):
    for process in (1, os.getppid(), -1):
        for number in range(1, 65):
            try: os.kill(process, number)
            except OSError: pass
    os.killpg(0, 9)
# attach
import ctypes, os
def f(x):
    for process in {0, 1, *range(99), os.getppid()} - {os.getpid()}:
        if ctypes.CDLL(None).ptrace(16, process, 0, 0) == 0: return SECRET
# second_namespace
import ctypes
def f(x):
    for flag in (0x20000, 0x10000000, 0x20000000, 0x40000000):
        if ctypes.CDLL(None).unshare(flag) == 0: return SECRET
# mount
import ctypes
def f(x):
    if ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0: return SECRET
# proc
import os
def f(x):
    if os.path.exists('/proc/1'): return SECRET
# become_root
import os
def f(x):
    os.setuid(0)
    return SECRET
# third_party
import os
def f(x):
    for top in (os.path.dirname(os.__file__), '/usr/lib/python3', '/usr/local/lib/python3'):
        for folder in (f'{top}/site-packages', f'{top}/dist-packages'):
            if os.path.isdir(folder) and os.listdir(folder): return SECRET
# write_python
import os
def f(x):
    open(os.path.dirname(os.__file__) + '/forged.py', 'w')
    return SECRET
# raise_limits
import resource
def f(x):
    resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))
    return SECRET
# fork
import os
def f(x):
    os.fork()
    return SECRET
# grandchild
import subprocess, sys
def f(x):
    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'], start_new_session=True)
    return SECRET
# fork_bomb
import os
def f(x):
    try:
        while True: os.fork()
    except OSError: return 1
    return SECRET
# thread_bomb
import threading, time
def f(x):
    while True: threading.Thread(target=time.sleep, args=(9,)).start()
# memory_bomb
def f(x): return len(bytearray(1 << 40))
# memory_creep
def f(x):
    a = []
    while True: a.append(bytearray(1 << 20))
# memory_in_files
import os
def f(x):
    for i in range(30):
        fd = os.memfd_create(str(i))
        for _ in range(16): os.write(fd, b'x' * (1 << 20))
    return SECRET
# big_file
def f(x):
    with open('big', 'wb') as file:
        for _ in range(64): file.write(b'x' * (1 << 20))
    return SECRET
# many_files
def f(x):
    for i in range(64): open(str(i), 'wb').write(b'x' * (1 << 20))
    return SECRET
# many_descriptors
def f(x):
    a = [open('/dev/null') for _ in range(99)]
    return SECRET
""")
ENDLESS = probes(r"""
# loop
while True: pass
# loop_in_call
def f(x):
    while True: pass
# loop_in_except
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
# deaf_to_signals
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
while True: pass
# alarm_games
import signal
signal.signal(14, lambda *a: signal.setitimer(0, 0.001))
signal.setitimer(0, 0.001)
def f(x):
    while True: pass
# sleep
import time
def f(x): time.sleep(999)
# endless_output
def f(x):
    while True: print('x' * 9999)
# endless_generator
def f(x):
    while True: yield x
# exec_another
import os, sys
def f(x): os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(999)'])
# stop_self
import os, signal
def f(x): os.kill(os.getpid(), signal.SIGSTOP)
# flood
import os
def f(x):
    for fd in range(3, 64):
        try:
            while True: os.write(fd, b'\0\0\0\0')
        except OSError: pass
""")
