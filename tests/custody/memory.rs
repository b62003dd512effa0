//! What the daemon's memory holds, before a seal and after it. With key memory that can be looked at: memfd_secret(2) is taken
//! away from the daemon by a seccomp filter, so that keys lie in locked memory, and a scan that finds nothing means something.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lethefs::crypto::aead::Cipher;
use lethefs::crypto::kdf::{self, DekLabel, KekLabel};
use lethefs::crypto::{ObjectId, VolumeId};
use lethefs::kms::{Binding, Purpose};
use rustix::fs::Advice;
use rustix::process::Pid;
use serde_json::{Value, json};

use crate::support::at_openbao::volume;
use crate::support::openbao::{Server, Storage};
use crate::support::volume::TestVolume;
use crate::{EKEYREVOKED, OFTEN, errno, wait_for_state};

/// Runs its arguments without memfd_secret(2) (number 447 everywhere): it is then as on a kernel that lacks it.
const WITHOUT_SECRET_MEMORY: &str = r"
import ctypes, os, struct, sys
insns = [(0x20, 0, 0, 0), (0x15, 0, 1, 447), (0x06, 0, 0, 0x50000 | 38), (0x06, 0, 0, 0x7fff0000)]
code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *i) for i in insns))
prog = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', len(insns), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(prog), 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execv(sys.argv[1], sys.argv[1:])
";

/// In plaintext of every block, and in every name.
const MARKER: &[u8] = b"Lethe-is-the-river-of-forgetting";

struct Secret {
    name: &'static str,
    bytes: Vec<u8>,
}

/// What follows the key itself in an AES-256 key schedule: its third and fourth round keys (FIPS 197, section 5.2).
fn round_keys(key: &[u8; 32]) -> Vec<u8> {
    fn times(mut a: u8, mut b: u8) -> u8 {
        let mut product = 0;
        while b != 0 {
            product ^= if b & 1 == 1 { a } else { 0 };
            a = a << 1 ^ if a & 0x80 == 0 { 0 } else { 0x1b };
            b >>= 1;
        }
        product
    }
    let substitute = |byte: u8| {
        let inverse = (0..=255).find(|other| times(byte, *other) == 1).unwrap_or(0);
        (0..5).fold(0x63, |sum, n| sum ^ inverse.rotate_left(n))
    };
    let mut words: Vec<[u8; 4]> = key.chunks(4).map(|word| word.try_into().unwrap()).collect();
    for n in 8..16 {
        let mut word: [u8; 4] = words[n - 1];
        if n == 8 {
            word.rotate_left(1);
            word = word.map(substitute);
            word[0] ^= 1;
        } else if n == 12 {
            word = word.map(substitute);
        }
        words.push(std::array::from_fn(|i| words[n - 8][i] ^ word[i]));
    }
    words[8..16].concat()
}

#[test]
fn the_key_schedule_is_that_of_fips_197() {
    // Appendix A.3.
    let key: Vec<u8> = (0..32)
        .map(|n| {
            u8::from_str_radix(
                &"603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"[2 * n..2 * n + 2],
                16,
            )
        })
        .collect::<Result<_, _>>()
        .unwrap();
    let expanded = round_keys(key.as_slice().try_into().unwrap());
    assert_eq!(expanded[..8], [0x9b, 0xa3, 0x54, 0x11, 0x8e, 0x69, 0x25, 0xaf]);
    assert_eq!(expanded[28..], [0xb7, 0x5d, 0x5b, 0x9a]);
}

/// Keys of the volume, and of one file of it, by way of the key service and the file itself.
fn secrets(server: &Server, v: &TestVolume, file: &std::path::Path) -> Vec<Secret> {
    let text = fs::read_to_string(v.backing().join("lethefs.volume")).unwrap();
    let body: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let id: VolumeId = body["volume_id"].as_str().unwrap().parse().unwrap();
    let binding = Binding { volume: id, scope: 0, version: 1, purpose: Purpose::Kek };
    let slot = &body["scopes"][0]["keks"][0]["slots"][0];
    let ask = json!({ "ciphertext": slot["wrapped"], "context": STANDARD.encode(binding.bytes()) });
    let reply = server.put("transit/decrypt/vol", ask);
    let base64 = reply["data"]["plaintext"].as_str().unwrap().to_owned();
    let kek: [u8; 32] = STANDARD.decode(&base64).unwrap().try_into().unwrap();
    let mut wrap = [0; 32];
    kdf::from_kek(&kek, KekLabel::Wrap, &id, 0, 1, &mut wrap);
    let header = fs::read(file).unwrap();
    let aad = [b"lethefs/1/dek".as_slice(), &id.0, &header[..68]].concat();
    let dek = Cipher::new(&wrap).open(header[68..80].try_into().unwrap(), &aad, &header[80..128]).unwrap();
    let dek: [u8; 32] = dek.as_slice().try_into().unwrap();
    let object = ObjectId(header[24..40].try_into().unwrap());
    let mut content = [0; 32];
    kdf::from_dek(&dek, DekLabel::Content, &object, &mut content);
    let secret = |name, bytes: &[u8]| Secret { name, bytes: bytes.to_vec() };
    vec![
        secret("KEK", &kek),
        secret("KEK in base64", base64.as_bytes()),
        secret("wrapping key", &wrap),
        secret("wrapping round keys", &round_keys(&wrap)),
        secret("DEK", &dek),
        secret("content key", &content),
        secret("content round keys", &round_keys(&content)),
        secret("plaintext", MARKER),
    ]
}

/// Which secrets are anywhere in a process's memory, and in what kinds of mappings.
fn scan(pid: Pid, secrets: &[Secret]) -> BTreeSet<String> {
    let pid = pid.as_raw_nonzero();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut found = BTreeSet::new();
    let (mut scanned, mut chunk) = (0_usize, vec![0; 1 << 20]);
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (range, rights) = (fields.next().unwrap(), fields.next().unwrap());
        let what = fields.nth(3).unwrap_or("anonymous");
        let (from, to) = range.split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).unwrap(), u64::from_str_radix(to, 16).unwrap());
        // The list of inodes: a gigabyte, hardly used, and of numbers only.
        if !rights.starts_with("rw") || to - from > 1 << 29 {
            continue;
        }
        let mut at = from;
        while at < to {
            let len = (to - at).min(1 << 20) as usize;
            let Ok(n) = memory.read_at(&mut chunk[..len], at) else { break };
            scanned += n;
            for secret in secrets {
                if memchr::memmem::find(&chunk[..n], &secret.bytes).is_some() {
                    found.insert(format!("{} in {what}", secret.name));
                }
            }
            // What lies across two chunks is seen by the next.
            at += if at + n as u64 == to || n < 256 { n as u64 } else { n as u64 - 256 };
        }
    }
    assert!(scanned > 1 << 20, "nothing could be looked at");
    found
}

#[test]
fn after_a_seal_no_key_and_no_plaintext_is_in_memory() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "vol");
    let program = v.lethefs::<&str>(&[]).get_program().to_owned();
    let mut command = v.command("python3");
    command.args(["-c", WITHOUT_SECRET_MEMORY]).arg(program).args(["mount", "backing", "mnt", "--json", OFTEN]);
    v.try_mount_by(&mut command).is(0);
    let status = v.cli(&["status", "mnt", "--json"]).json();
    assert_eq!(status["live"]["counters"]["key_memory"], "mlock");

    let block: Vec<u8> = MARKER.iter().copied().cycle().take(1 << 20).collect();
    let name = |n: usize| v.at(format!("{n}-{}", String::from_utf8_lossy(MARKER)));
    fs::write(name(0), &block).unwrap();
    File::open(name(0)).unwrap().sync_all().unwrap();
    let files = fs::read_dir(v.backing()).unwrap().flatten().map(|entry| entry.path());
    let only = { files }.find(|path| fs::metadata(path).is_ok_and(|meta| meta.len() > 1 << 20)).unwrap();
    let secrets = secrets(&server, &v, &only);

    // Everything passes through every worker; what is there at some moment is found.
    let stop = AtomicBool::new(false);
    let mut before = BTreeSet::new();
    let all: BTreeSet<&str> = secrets.iter().map(|secret| secret.name).collect();
    std::thread::scope(|scope| {
        for n in 0..8 {
            let (stop, block, name) = (&stop, &block, &name);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    fs::write(name(n), block).unwrap();
                    let file = File::open(name(n)).unwrap();
                    file.sync_all().unwrap();
                    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
                    assert!(fs::read(name(n)).unwrap() == *block);
                }
            });
        }
        for _ in 0..20 {
            before.extend(scan(v.daemon(), &secrets));
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("before the seal: {before:?}");
    for must in ["KEK", "wrapping key", "content key", "plaintext"] {
        assert!(
            before.iter().any(|found| found.starts_with(&format!("{must} in"))),
            "the scan does not find the {must}"
        );
    }
    let never: Vec<_> =
        all.iter().filter(|name| !before.iter().any(|found| found.starts_with(&format!("{name} in")))).collect();
    println!("never seen: {never:?}");

    server.delete_key("vol");
    let sealed = wait_for_state(&v, "destroyed");
    assert_eq!(sealed["last_seal"]["unscrubbed_workers"], 0, "{sealed}");
    let after = scan(v.daemon(), &secrets);
    assert!(after.is_empty(), "after the seal: {after:?}");
    // (A program that asks now tells the daemon a name.)
    assert_eq!(errno(fs::read(name(1))), EKEYREVOKED);
    v.umount();
}
