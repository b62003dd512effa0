//! A TLS server that says one thing to everybody, for the replies that no real server can be brought to give.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::thread;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use tempfile::TempDir;

use super::openbao::make_certificates;

/// Serves until the test's process ends.
pub(crate) struct Stub {
    pub(crate) dir: TempDir,
    pub(crate) address: String,
}

impl Stub {
    /// Says `reply`, headers and all, to every request, and closes the connection.
    pub(crate) fn start(reply: Vec<u8>) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = TempDir::with_prefix("lethefs-stub.").expect("temporary directory");
        make_certificates(dir.path());
        let chain = CertificateDer::pem_file_iter(dir.path().join("srv.pem"))
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .expect("certificate");
        let key = PrivateKeyDer::from_pem_file(dir.path().join("srv.key")).expect("key");
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).expect("configuration");
        let config = Arc::new(config);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("port");
        let address = format!("https://{}", listener.local_addr().expect("address"));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, reply) = (config.clone(), reply.clone());
                thread::spawn(move || {
                    let connection = ServerConnection::new(config).expect("connection");
                    let mut stream = StreamOwned::new(connection, stream);
                    let mut head = Vec::new();
                    let mut byte = [0];
                    while !head.ends_with(b"\r\n\r\n") {
                        if stream.read_exact(&mut byte).is_err() {
                            return;
                        }
                        head.push(byte[0]);
                    }
                    // The client may have closed its end already: it is what is tested.
                    let _ = stream.write_all(&reply);
                    stream.conn.send_close_notify();
                    let _ = stream.flush();
                    // Not before the client has had it all: closing with unread input would reset the connection.
                    let _ = stream.read_to_end(&mut Vec::new());
                });
            }
        });
        Self { dir, address }
    }
}
