//! Keys under a key file on this machine: `file:///path`, the service that needs no server.
//!
//! For trying things out, tests, and hosts whose key file lives on removable or wiped storage. Whoever can read the
//! file can open the volume, nobody vouches for its destruction, and copies of it are out of anybody's sight: every
//! [`Proof`] from here says so. The file itself is [`store`]'s; this is what is done with it.

mod store;

use std::path::{Path, PathBuf};

use aes_gcm_siv::aead::inout::InOutBuf;
use aes_gcm_siv::{AeadInOut as _, Aes256GcmSiv, KeyInit as _, Nonce, Tag};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

use self::store::{Stored, Wiped};
use super::{
    Binding, Destruction, Failure, Finding, KeyAdmin, KeyDescription, KeyIdentity, KeySource, KmsError, MadeKey,
    Permissions, Proof, Wrapped, WrappedKey,
};
use crate::crypto::Key32;

const PREFIX: &str = "lethefs-file:v1:";
const NONCE: usize = 12;
const TAG: usize = 16;

/// One key file: the mount host's side and the administrator's, which here differ only by file permissions.
pub struct KeyFile {
    path: PathBuf,
}

impl KeyFile {
    /// The key file at an absolute path. Opens nothing.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    fn what(&self) -> String {
        format!("key file {}", self.path.display())
    }

    fn not_ours(&self) -> KmsError {
        KmsError::new(
            Failure::Config,
            format!("what was recorded is not a key file, unlike {}: check the key URI", self.what()),
        )
    }

    fn bad_data(&self) -> KmsError {
        KmsError::new(
            Failure::BadData,
            format!("{} rejects the wrapped key: it is damaged, or belongs to another volume", self.what()),
        )
    }

    fn other_key(&self, found: &Stored) -> KmsError {
        KmsError::new(
            Failure::Recreated,
            format!("{} holds another key (id {}) than the recorded one", self.what(), found.key_id),
        )
    }
}

fn identity(stored: &Stored) -> KeyIdentity {
    KeyIdentity::File { key_id: stored.key_id, created: stored.created.clone() }
}

fn cipher(stored: &Stored) -> Aes256GcmSiv {
    let mut key = Zeroizing::new([0; 32]);
    stored.key.expose(|bytes| {
        let kdf = Hkdf::<Sha256>::new(Some(&stored.key_id.0), bytes);
        // 32 bytes is one block of SHA-256: never too long for RFC 5869.
        if kdf.expand(b"lethefs/1/file-kms", key.as_mut()).is_err() {
            unreachable!("32 bytes is a valid HKDF-SHA-256 length")
        }
    });
    Aes256GcmSiv::new((&*key).into())
}

fn wrap(stored: &Stored, binding: &Binding, key: &Key32) -> Result<Wrapped, KmsError> {
    let failed = |_| KmsError::new(Failure::Config, "the system's random number generator failed");
    let mut out = Zeroizing::new([0u8; NONCE + 32 + TAG]);
    let (nonce_bytes, rest) = out.split_at_mut(NONCE);
    let (text, tag_bytes) = rest.split_at_mut(32);
    getrandom::fill(nonce_bytes).map_err(failed)?;
    key.expose(|bytes| text.copy_from_slice(bytes));
    let mut nonce = Nonce::default();
    nonce.copy_from_slice(nonce_bytes);
    let tag = cipher(stored)
        .encrypt_inout_detached(&nonce, &binding.bytes(), InOutBuf::from(text))
        .map_err(|_| KmsError::new(Failure::Protocol, "the key cannot be encrypted"))?;
    tag_bytes.copy_from_slice(&tag);
    Ok(Wrapped(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(*out))))
}

fn open(stored: &Stored, binding: &Binding, wrapped: &Wrapped) -> Option<Key32> {
    let text = wrapped.0.strip_prefix(PREFIX)?;
    let mut sealed = [0u8; NONCE + 32 + TAG];
    if URL_SAFE_NO_PAD.decode_slice(text, &mut sealed).ok()? != sealed.len() {
        return None;
    }
    let (mut nonce, mut tag) = (Nonce::default(), Tag::default());
    nonce.copy_from_slice(&sealed[..NONCE]);
    tag.copy_from_slice(&sealed[NONCE + 32..]);
    Key32::fill_with(|bytes| {
        bytes.copy_from_slice(&sealed[NONCE..NONCE + 32]);
        cipher(stored).decrypt_inout_detached(&nonce, &binding.bytes(), InOutBuf::from(bytes.as_mut_slice()), &tag)
    })
    .ok()
}

impl KeySource for KeyFile {
    /// Makes the key file too, if there is none.
    fn make(&self, binding: &Binding) -> Result<MadeKey, KmsError> {
        let stored = store::load_or_create(&self.path)?;
        let key = Key32::random()
            .map_err(|_| KmsError::new(Failure::Config, "the system's random number generator failed"))?;
        let wrapped = wrap(&stored, binding, &key)?;
        Ok(MadeKey { key, wrapped, identity: identity(&stored) })
    }

    fn wrap(&self, binding: &Binding, key: &Key32) -> Result<WrappedKey, KmsError> {
        let stored = store::load_or_create(&self.path)?;
        Ok(WrappedKey { wrapped: wrap(&stored, binding, key)?, identity: identity(&stored) })
    }

    fn unwrap(&self, binding: &Binding, wrapped: &Wrapped, recorded: &KeyIdentity) -> Result<Key32, KmsError> {
        let KeyIdentity::File { key_id, .. } = recorded else { return Err(self.not_ours()) };
        let stored = store::load(&self.path)?;
        if stored.key_id != *key_id {
            return Err(self.other_key(&stored));
        }
        open(&stored, binding, wrapped).ok_or_else(|| self.bad_data())
    }

    fn describe(&self) -> Result<KeyDescription, KmsError> {
        let (stored, suspended) = store::look(&self.path)?;
        let mut warnings = vec![
            "The key is a file on this machine: whoever can read or copy it can open the volume, and no \
             service can show that it is gone."
                .to_owned(),
        ];
        if suspended {
            warnings.push("The key file is suspended: lethefs does not use it until it is restored.".to_owned());
        }
        Ok(KeyDescription {
            identity: identity(&stored),
            quantum_durable: true,
            warnings,
            deletion_allowed: store::may_change_directory(&self.path),
        })
    }

    fn permissions(&self) -> Result<Permissions, KmsError> {
        let may_change = store::may_change_directory(&self.path);
        let readable = match store::load(&self.path) {
            Ok(_) => true,
            Err(error) if error.failure == Failure::Missing => {
                let none = Some(false);
                return Ok(Permissions {
                    make: Some(may_change),
                    unwrap: none,
                    describe: none,
                    suspend: none,
                    destroy: none,
                });
            }
            Err(error) if matches!(error.failure, Failure::Denied | Failure::Suspended) => false,
            Err(error) => return Err(error),
        };
        Ok(Permissions {
            make: Some(readable),
            unwrap: Some(readable),
            describe: Some(readable),
            suspend: Some(readable && may_change),
            destroy: Some(readable && may_change),
        })
    }
}

impl KeyAdmin for KeyFile {
    fn describe(&self) -> Result<KeyDescription, KmsError> {
        KeySource::describe(self)
    }

    /// Puts the file aside under another name. A switch for lethefs on this machine, and no more: whoever can read the file still
    /// can, and copies of it work.
    fn suspend(&self, recorded: &KeyIdentity) -> Result<Option<Destruction>, KmsError> {
        let KeyIdentity::File { key_id, .. } = recorded else { return Err(self.not_ours()) };
        match store::suspend(&self.path, key_id)? {
            Some(stored) => Err(self.other_key(&stored)),
            None => Ok(Some(Destruction::Suspended)),
        }
    }

    fn restore(&self) -> Result<(), KmsError> {
        store::restore(&self.path)
    }

    fn may_destroy(&self, recorded: &KeyIdentity) -> Result<Option<bool>, KmsError> {
        let KeyIdentity::File { key_id, .. } = recorded else { return Err(self.not_ours()) };
        match store::look(&self.path) {
            Ok((stored, _)) if stored.key_id != *key_id => Err(self.other_key(&stored)),
            Ok(_) if store::may_change_directory(&self.path) => Ok(Some(true)),
            Ok(_) => Err(KmsError::new(
                Failure::Denied,
                format!("{} lies in a directory that may not be changed from here", self.what()),
            )),
            Err(error) if error.failure == Failure::Missing => Ok(Some(true)),
            Err(error) => Err(error),
        }
    }

    fn destroy(&self, recorded: &KeyIdentity) -> Result<Destruction, KmsError> {
        let KeyIdentity::File { key_id, .. } = recorded else { return Err(self.not_ours()) };
        match store::wipe(&self.path, key_id)? {
            Wiped::Done | Wiped::WasGone => Ok(Destruction::CarriedOut),
            Wiped::OtherKey(stored) => {
                let mut error = self.other_key(&stored);
                error.message.push_str("; nothing was changed");
                Err(error)
            }
        }
    }

    fn prove_destroyed(&self, recorded: &KeyIdentity, _: Option<(&Binding, &Wrapped)>) -> Result<Proof, KmsError> {
        let KeyIdentity::File { key_id, .. } = recorded else { return Err(self.not_ours()) };
        let answered = store::absence(&self.path)
            .map_err(|reason| KmsError::new(Failure::NotDestroyed, format!("{}: {reason}", self.what())))?;
        Ok(Proof {
            self_asserted: true,
            at: jiff::Timestamp::now().to_string(),
            findings: vec![
                Finding {
                    asked: format!("lstat {}", self.path.display()),
                    answered,
                    shows: format!("no file is at the place of the key file with id {key_id}"),
                },
                Finding {
                    asked: "other copies".to_owned(),
                    answered: "not asked: nobody can tell".to_owned(),
                    shows: "nothing: a copy, a backup, a snapshot, or old blocks of the disk may still hold the key, \
                            and the place may only be unmounted"
                        .to_owned(),
                },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::crypto::VolumeId;
    use crate::kms::Purpose;

    const BINDING: Binding = Binding { volume: VolumeId([7; 16]), scope: 0, version: 1, purpose: Purpose::Kek };

    fn class<T>(result: Result<T, KmsError>) -> Failure {
        let Err(error) = result else { panic!("should have failed") };
        assert!(!error.message.contains('\n'), "{error}");
        error.failure
    }

    #[test]
    fn wrapping_is_the_documented_one() {
        let key = |byte| Key32::from_zeroizing(vec![byte; 32].into()).expect("32 bytes");
        let stored = Stored { key_id: VolumeId([1; 16]), created: "2026-01-01T00:00:00Z".into(), key: key(2) };
        let wrapped = wrap(&stored, &BINDING, &key(3)).expect("wrapped");
        let sealed =
            URL_SAFE_NO_PAD.decode(wrapped.0.strip_prefix("lethefs-file:v1:").expect("prefix")).expect("base64");
        let mut kek = [0; 32];
        Hkdf::<Sha256>::new(Some(&[1; 16]), &[2; 32]).expand(b"lethefs/1/file-kms", &mut kek).expect("length");
        let mut text = sealed[12..44].to_vec();
        let mut tag = Tag::default();
        tag.copy_from_slice(&sealed[44..]);
        let mut nonce = Nonce::default();
        nonce.copy_from_slice(&sealed[..12]);
        Aes256GcmSiv::new((&kek).into())
            .decrypt_inout_detached(&nonce, &BINDING.bytes(), InOutBuf::from(text.as_mut_slice()), &tag)
            .expect("opens");
        assert_eq!(text, [3; 32]);
        for cut in ["", "lethefs-file:v1:", "vault:v1:AAAA", &wrapped.0[..wrapped.0.len() - 1]] {
            assert!(open(&stored, &BINDING, &Wrapped(cut.to_owned())).is_none(), "{cut}");
        }
    }

    #[test]
    fn a_file_that_others_could_have_made_or_read_is_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("key");
        let file = KeyFile::new(&path);
        assert_eq!(class(KeySource::describe(&file)), Failure::Missing);
        let made = file.make(&BINDING).expect("made");
        let good = std::fs::read(&path).expect("written");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o7777, 0o600);
        let try_it = || file.unwrap(&BINDING, &made.wrapped, &made.identity);
        for mode in [0o640, 0o604, 0o620, 0o601] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
            assert_eq!(class(try_it()), Failure::Config, "{mode:o}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
        assert!(try_it().is_ok());

        let text = String::from_utf8(good.clone()).expect("text");
        let key_at = text.find("\"key\":\"").expect("key") + 7;
        for (bad, why) in [
            (String::new(), "empty"),
            (text[..text.len() / 2].to_owned(), "cut"),
            (format!("{}\n", text.trim_end()).repeat(2), "twice"),
            (text.replace("\"lethefs_key_file\":1", "\"lethefs_key_file\":2"), "newer"),
            (text.replace("\"created\"", "\"x\":1,\"created\""), "unknown field"),
            (format!("{}A{}", &text[..key_at], &text[key_at..]), "longer key"),
            (format!("{}{}", &text[..key_at], &text[key_at + 4..]), "shorter key"),
            (format!("{text}{}", " ".repeat(4096)), "large"),
        ] {
            std::fs::write(&path, &bad).expect("written");
            let error = try_it().map(|_| ()).expect_err(why);
            assert_eq!(error.failure, Failure::Config, "{why}");
            assert!(!format!("{error} {error:?}").contains(&text[key_at..key_at + 40]), "{why} shows the key");
            assert_eq!(std::fs::read(&path).expect("there"), bad.as_bytes(), "{why}: changed");
            assert_eq!(class(file.make(&BINDING)), Failure::Config, "{why}");
            assert_eq!(class(file.destroy(&made.identity)), Failure::Config, "{why}");
        }
        std::fs::remove_file(&path).expect("removed");
        std::fs::create_dir(&path).expect("directory");
        assert_eq!(class(try_it()), Failure::Config, "directory");
        std::fs::remove_dir(&path).expect("removed");
        let other = dir.path().join("other");
        std::fs::write(&other, &good).expect("written");
        std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o600)).expect("chmod");
        symlink(&other, &path).expect("symlink");
        assert_eq!(class(try_it()), Failure::Config, "symlink");
        assert_eq!(class(file.make(&BINDING)), Failure::Config, "symlink");
        assert_eq!(class(file.destroy(&made.identity)), Failure::Config, "symlink");
        assert_eq!(class(file.prove_destroyed(&made.identity, None)), Failure::NotDestroyed, "symlink");
        assert_eq!(std::fs::read(&other).expect("there"), good);
    }

    #[test]
    fn destroying_wipes_every_hard_link_and_can_be_finished_later() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (path, link) = (dir.path().join("key"), dir.path().join("link"));
        let file = KeyFile::new(&path);
        let made = file.make(&BINDING).expect("made");
        let size = std::fs::metadata(&path).expect("there").len() as usize;
        std::fs::hard_link(&path, &link).expect("linked");
        assert_eq!(file.destroy(&made.identity).expect("destroyed"), Destruction::CarriedOut);
        assert!(!path.exists());
        assert_eq!(std::fs::read(&link).expect("there"), vec![0; size]);
        // What a crash between the zeros and the unlink leaves.
        std::fs::rename(&link, &path).expect("renamed");
        assert_eq!(class(file.unwrap(&BINDING, &made.wrapped, &made.identity)), Failure::Missing);
        assert_eq!(class(file.prove_destroyed(&made.identity, None)), Failure::NotDestroyed);
        assert_eq!(file.destroy(&made.identity).expect("finished"), Destruction::CarriedOut);
        assert!(!path.exists());
        assert!(file.prove_destroyed(&made.identity, None).expect("proved").self_asserted);
        // A place that is gone shows nothing.
        let nowhere = KeyFile::new(&dir.path().join("not/there"));
        assert_eq!(class(nowhere.prove_destroyed(&made.identity, None)), Failure::NotDestroyed);
    }

    #[test]
    fn two_makers_end_with_one_key_file() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("key");
        let made: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| KeyFile::new(&path).make(&BINDING).expect("made"))).collect();
            threads.into_iter().map(|thread| thread.join().expect("joined")).collect()
        });
        for key in &made {
            assert_eq!(key.identity, made[0].identity);
            let opened = KeyFile::new(&path).unwrap(&BINDING, &key.wrapped, &key.identity).expect("opens");
            assert!(opened.same_as(&key.key));
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("listed").count(), 1, "leftovers");
    }
}
